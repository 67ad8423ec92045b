/* Links to the other versions of these pages, where .ci/publish has put them beside each other. */
"use strict";

document.addEventListener("DOMContentLoaded", async () => {
  const root = new URL(document.documentElement.dataset.content_root, location.href);
  if (root.protocol === "file:") return;
  const found = await fetch(new URL("../versions.json", root));
  if (!found.ok) return;
  const links = document.createElement("nav");
  links.className = "versions";
  links.setAttribute("aria-label", "Versions");
  for (const version of await found.json()) {
    const link = document.createElement("a");
    link.href = new URL(`../${version}/index.html`, root);
    link.textContent = version;
    if (root.pathname.endsWith(`/${version}/`)) link.setAttribute("aria-current", "true");
    links.append(link);
  }
  document.querySelector(".sidebar-search-container").after(links);
});
