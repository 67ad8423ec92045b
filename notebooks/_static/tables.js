/* Tables of more than 12 rows sort by a click on a heading; those of more than 40 are filtered by words. */
"use strict";

function number(cell) {
  const found = cell.textContent.replaceAll(",", "").replace("−", "-").match(/-?\d+(\.\d+)?(e[-+]?\d+)?/i);
  return found ? Number(found[0]) : NaN;
}

function sort(table, column, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const numbers = rows.every((row) => !row.cells[column].textContent.trim() || !Number.isNaN(number(row.cells[column])));
  rows.sort((one, other) => {
    const [a, b] = [one.cells[column], other.cells[column]];
    if (!numbers) return a.textContent.localeCompare(b.textContent);
    const [x, y] = [number(a), number(b)];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return x - y;
  });
  body.append(...(descending ? rows.reverse() : rows));
}

function sortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(table, column, descending);
    });
  });
}

function filtered(table, frame) {
  const rows = [...table.tBodies[0].rows];
  const label = document.createElement("label");
  const input = document.createElement("input");
  const found = document.createElement("p");
  label.className = "filter";
  found.className = "found";
  found.setAttribute("role", "status");
  input.type = "search";
  label.append("Rows with all these words: ", input);
  frame.before(label, found);
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    found.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  input.addEventListener("input", show);
  show();
}

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table.docutils")) {
    if (!table.tHead) continue;
    const count = table.tBodies[0].rows.length;
    const frame = table.closest(".table-wrapper") ?? table;
    if (count > 12) sortable(table);
    if (count > 40) {
      frame.classList.add("long");
      filtered(table, frame);
    }
  }
  /* What scrolls can be reached by the keyboard. */
  for (const frame of document.querySelectorAll(".table-wrapper, .math-wrapper, article pre")) {
    if (frame.scrollWidth > frame.clientWidth || frame.scrollHeight > frame.clientHeight) frame.tabIndex = 0;
  }
});
