"""From PTX, as NVRTC writes it, to C++ that does the same on the host.

A kernel becomes a function of its name and parameters, run once for every thread of a grid: its
registers are variables, its labels labels. tests/csrc/ptx.h runs a block of them, in ``run_block``,
and says what an instruction does; an instruction that is missing there is an error of the C++
compiler.
"""

import re

_TYPES = {
    "pred": "bool", "f32": "float", "f64": "double",
    "f16": "coded_torch::float16", "bf16": "coded_torch::bfloat16",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
}  # fmt: skip
_SPECIAL = {
    "%tid.x": "block::run.thread", "%ctaid.x": "current.index", "%ntid.x": "current.threads",
}  # fmt: skip
# How many registers an access moves is plain from its operands; how long a cache keeps them is not
# to be seen.
_IMPLIED = {"v2", "v4", "cs", "nc"}
# Instructions without a result.
_PLAIN = {"bar", "prefetch"}
# Of a block without launch bounds.
_MAX_THREADS = 1024


def translate(ptx: str) -> str:
    """All kernels of one module, or of several behind each other."""
    shared = dict.fromkeys(re.findall(r"^\.extern \.shared .* (\w+)\[\];$", ptx, re.M))
    kernels = re.findall(r"\.entry (\w+)\((.*?)\)([^{]*)^{$(.*?)^}$", ptx, re.S | re.M)
    parts = [
        '#include "ptx.h"\n\nusing namespace ptx;\n',
        *(f"constexpr uint32_t {name} = 0;  // where it begins\n" for name in shared),
        *(_function(*kernel) for kernel in kernels),
    ]
    return "\n".join(parts)


def _function(name: str, parameters: str, directives: str, body: str) -> str:
    body = re.sub(r"//.*|^\s*\.pragma.*;", "", body, flags=re.M)
    body = re.sub(r"{([^{}]*;)\s*}", r"\1", body)  # inline assembly has a block of its own
    statements = (s.strip() for s in re.split(r";|(?<=:)\s", body))
    lines = "\n".join(f"  {_statement(s)};" for s in statements if s)
    declared = [_parameter(*p.split()[1:]) for p in parameters.split(",\n")]
    signature = ", ".join(" ".join(parameter) for parameter in declared)
    arguments = ", ".join(f"*static_cast<{t}*>(p[{i}])" for i, (t, _) in enumerate(declared))
    bounds = re.search(r"\.maxntid (\d+)", directives)
    return (
        f'extern "C" void {name}({signature}) {{\n{lines}\n}}\n'
        f"static const Registered registered_{name}(\n"
        f'    "{name}", {{[](void** p) {{ {name}({arguments}); }},\n'
        f"     {bounds[1] if bounds else _MAX_THREADS}}});\n"
    )


def _parameter(*words: str) -> tuple[str, str]:
    """Type and name of ``.u64 .ptr NAME``, or of ``.align 8 .b8 NAME[120]``, which is a struct."""
    name, kind = words[-1], next(word for word in words if word[1:] in _TYPES)
    if array := re.fullmatch(r"(\w+)\[(\d+)\]", name):
        return f"Bytes<{array[2]}>", array[1]
    return _TYPES[kind[1:]], name


def _statement(text: str) -> str:
    if label := re.fullmatch(r"\$(\w+):", text):
        return f"{label[1]}:"
    if registers := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>", text):
        kind, name, count = registers.groups()
        return f"{_TYPES[kind]} {', '.join(f'{name}{i}{{}}' for i in range(int(count)))}"
    guarded = re.fullmatch(r"(?:@(!?)%(\w+)\s+)?(\S+)\s*(.*)", text, re.S)
    negated, predicate, opcode, operands = guarded.groups()
    done = _instruction(opcode.split("."), re.findall(r"{.*?}|\[.*?\]|[^\s,]+", operands))
    return f"if ({negated}{predicate}) {done}" if predicate else done


def _instruction(opcode: list[str], operands: list[str]) -> str:
    if opcode[0] == "ret":
        return "return"
    if opcode[0] == "bra":
        return f"goto {operands[0][1:]}"
    name = "_".join(["op", *(p for p in opcode if p not in _TYPES and p not in _IMPLIED)])
    types = ", ".join(_TYPES[part] for part in opcode if part in _TYPES)
    if opcode[0] in _PLAIN:
        return f"{name}({', '.join(map(_operand, operands))})"
    to, *values = map(_operand, operands)
    if opcode[0] == "st":
        return f"{name}<{types}>({to}, {values[0]})"
    if opcode[0] == "ld" or operands[0].startswith("{"):  # fills its registers itself
        return f"{name}<{types}>({', '.join(values)}, {to})"
    return f"set({to}, {name}<{types}>({', '.join(values)}))"


def _operand(text: str) -> str:
    """A register, a number, the address of a parameter, a sum in brackets, several in braces."""
    if text[0] == "[":
        return " + ".join(map(_operand, text[1:-1].split("+")))
    if text[0] == "{":
        return ", ".join(map(_operand, re.split(r",\s*", text[1:-1])))
    if text in _SPECIAL:
        return _SPECIAL[text]
    if number := re.fullmatch(r"0([fd])([0-9A-F]+)", text):
        kind, bits = number.groups()
        kind = "f32" if kind == "f" else "f64"
        return f"as<{_TYPES[kind]}>({_TYPES[kind.replace('f', 'b')]}{{0x{bits}u}})"
    if re.fullmatch(r"-?\d+", text):
        return f"int64_t{{{text}}}"
    if re.search(r"_param_\d+$", text):
        return f"address_of({text})"
    return text.removeprefix("%")
