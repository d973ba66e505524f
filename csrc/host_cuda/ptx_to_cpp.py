"""Translates PTX, as nvcc and Triton emit it for sm_80 and later, to C++ that runs on the host emulation.

    python ptx_to_cpp.py in.ptx out.cpp

Every kernel becomes a function on the emulated thread's registers, which are plain variables that hold bits; what an
instruction does is in ptx.h, whose functions have the instructions' names. An instruction that is not known, or known
but not in that form, is an error. Flushing of denormals (.ftz) is not emulated, and approximate functions are exact.
"""

import re
import sys

INTEGERS = dict(u="uint", s="int", b="uint")
TYPES = {f"{kind}{size}": f"{name}{size}_t" for kind, name in INTEGERS.items() for size in (8, 16, 32, 64)}
TYPES |= dict(f16="half", bf16="bf16", f32="float", f64="double", pred="bool")
FLOATS = ("f16", "bf16", "f32", "f64")
LOW = ("f16", "bf16")
SPECIAL = dict(tid="index", ctaid="block", ntid="block_size", nctaid="grid_size")

# Instructions that are functions of their operands, by these operands' types: t the instruction's own, w twice as wide,
# u 32 bits unsigned, p a predicate. One of FORMS belongs to the name.
FUNCTIONS = {
    "t": "neg abs not cnot popc clz brev sqrt rcp rsqrt ex2 lg2 sin cos tanh",
    "tt": "add sub mul mul.lo mul.hi mul.wide div rem min max min.NaN max.NaN and or xor copysign",
    "ttt": "fma fma.rm mad.lo prmt shf.l.wrap shf.l.clamp shf.r.wrap shf.r.clamp",
    "tttt": "lop3",
    "ttw": "mad.wide",
    "ttp": "selp",
    "tu": "shl shr",
    "tuu": "bfe",
    "ttuu": "bfi",
}
FUNCTIONS = {name: types for types, names in FUNCTIONS.items() for name in names.split()}
FORMS = ("rm", "lo", "hi", "wide", "l", "r", "wrap", "clamp", "NaN")
WITHOUT_EFFECT = {"rn", "ftz", "approx", "full", "uni"}

COMPARISONS = dict(eq="==", ne="!=", lt="<", le="<=", gt=">", ge=">=")
JOINS = {"and": "&&", "or": "||", "xor": "!="}
UNSIGNED = dict(lo="lt", ls="le", hi="gt", hs="ge")
SPACES = ("global", "shared", "local", "param", "const")
ROUNDINGS = ("rni", "rzi", "rmi", "rpi")
SHUFFLES = ("up", "down", "bfly", "idx")
ATOMICS = {"add": "old + x", "min": "x < old ? x : old", "max": "x > old ? x : old", "and": "old & x", "or": "old | x",
           "xor": "old ^ x", "exch": "x", "inc": "old >= x ? 0 : old + 1", "cas": "old == x ? y : old"}  # fmt: skip
VOTES = {"popc": "{0}", "or": "{0} > 0", "and": "{1} == 0"}
REDUX = {name: ATOMICS[name] for name in ("add", "min", "max", "and", "or", "xor")}
NEWLINE = "\n"
MMA = dict(bf16="bf16", f16="half", tf32="tf32")
# of loads and stores: what says where values are kept and who sees them when, which is one on the host
HINTS = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "relaxed", "acquire", "release", "volatile", "cta",
         "gpu", "sys", "L1", "L2"}  # fmt: skip
ELEMENTS = {"v2": 2, "v4": 4}
CARRYING = re.compile(r"(add|sub|mad)(c?)(?:\.(lo|hi))?(\.cc)?\.([us](?:32|64))")

STATEMENT = re.compile(
    r"""\s*(?: (?P<line>\.loc\s+(?P<file>\d+)\s+(?P<number>\d+)[^\n]*) | (?P<brace>[{}]) | (?P<label>[$\w]+): |
               (?:@(?P<unless>!?)(?P<predicate>%[\w$]+)\s+)? (?P<name>[.\w:]+)\s* (?P<operands>[^;]*); )""",
    re.X,
)


class Unsupported(Exception):
    pass


def bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind.removeprefix("b"))) if kind != "pred" else 8


def identifier(name: str) -> str:
    return "_" + re.sub(r"\W", "_", name)


def split(operands: str) -> list[str]:
    """At commas outside braces and brackets."""
    return [o.strip() for o in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", operands) if o.strip()]


def elements(operand: str) -> list[str]:
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


def one_of(modifiers: list[str], names, default: str | None = None) -> str:
    for m in modifiers:
        if (m := m.split("::")[0]) in names:
            return m
    if default is None:
        raise Unsupported
    return default


class Kernel:
    def __init__(self, name: str, parameters: str, text: "Text"):
        self.name, self.shared, self.tables, self.files = name, text.shared, text.tables, text.files
        self.variables = text.variables
        self.arrays: set[str] = set()  # .local
        self.used: set[str] = set()  # shared arrays
        self.parameters: dict[str, tuple[int, int]] = {}  # offset and size
        end = 0
        for p in filter(str.strip, parameters.split(",")):
            m = re.search(r"\.param(?:\s+\.align\s+(\d+))?\s+\.(\w+)\b.*?([\w$]+)(?:\[(\d+)\])?\s*$", p.strip(), re.S)
            size = bits(m[2]) // 8
            align, size = int(m[1] or size), size * int(m[4] or 1)
            start = -(-end // align) * align
            self.parameters[m[3]], end = (start, size), start + size

    # ---- operands ----
    def value(self, operand: str) -> str:
        """An operand's bits."""
        if m := re.fullmatch(r"%(tid|ctaid|ntid|nctaid)\.([xyz])", operand):
            return f"uint32_t(current->{SPECIAL[m[1]]}.{m[2]})"
        if operand in ("%laneid", "%warpid"):
            return f"current->{operand[1:5]}"
        if re.fullmatch(r"%\w+", operand) and operand not in ("%clock", "%clock64", "%globaltimer", "%smid"):
            return identifier(operand)
        if m := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}(?:[0-9a-fA-F]{8})?)", operand):
            return f"0x{m[1]}ull"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            return f"{int(operand.rstrip('U'), 0) % (1 << 64)}ull"
        if operand == "WARP_SZ":
            return "32u"
        if operand in self.shared:
            self.used.add(operand)
            return identifier(operand)
        if operand in self.arrays:
            return f"uint64_t({identifier(operand)} - local)"
        if operand in self.variables:
            return f"uint64_t({identifier(operand)})"
        if operand in self.parameters:
            return f"uint64_t(parameters + {self.parameters[operand][0]})"
        raise Unsupported(f"operand {operand}")

    def read(self, operand: str, kind: str) -> str:
        if operand.startswith("!"):
            return f"!{self.value(operand[1:])}"
        how = f"read<{TYPES[kind]}>" if kind in FLOATS else TYPES[kind]
        return f"{how}({self.value(operand)})"

    def u32(self, operand: str) -> str:
        return self.read(operand, "u32")

    def number(self, operand: str, kind: str) -> str:
        """To compare: C++ has no such operators for 16-bit floats."""
        value = self.read(operand, kind)
        return f"widen({value})" if kind in LOW else value

    def write(self, operand: str, expression: str, kind: str = "b64") -> str:
        if operand == "_":
            return f"(void)({expression});"
        return f"{identifier(operand)} = {f'to_bits({expression})' if kind in FLOATS else expression};"

    def address(self, operand: str, space: str) -> str:
        m = re.fullmatch(r"\[\s*([^\s+\]]+?)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not m:
            raise Unsupported(f"address {operand}")
        base, offset = self.value(m[1]), int(m[2] or "0", 0)
        if space == "shared":
            return f"(space + uint32_t({base} + {offset}))"
        if space == "local":
            return f"(local + uint32_t({base} + {offset}))"
        return f"((char*)(uint64_t({base}) + {offset}ll))"

    def checked(self, operand: str, space: str, size: int) -> str:
        """The address of an access of so many bytes."""
        check = "global" if space == "global" else "aligned"
        return f"{check}<{size}>({self.address(operand, space)}, HERE)"

    # ---- statements ----
    def statement(self, m: re.Match) -> str:
        if m["line"]:
            return f'#line {m["number"]} "{self.files.get(m["file"], self.name)}"'
        if m["brace"]:
            return m["brace"]
        if m["label"]:
            return f"{identifier(m['label'])}:;"
        if m["name"].startswith("."):
            return self.directive(m["name"], m["operands"])
        try:
            code = self.instruction(m["name"], split(m["operands"]))
        except (Unsupported, KeyError, IndexError, ValueError) as e:
            why = f" ({e})" if str(e) else ""
            raise Unsupported(f"{self.name}: unsupported instruction {m[0].strip()}{why}") from e
        if m["predicate"]:
            return f"if ({m['unless']}{identifier(m['predicate'])}) {{ {code} }}"
        return code

    def directive(self, name: str, operands: str) -> str:
        if name == ".reg":
            kind, names = operands.split(None, 1)
            kind = TYPES["pred" if kind == ".pred" else f"u{max(16, bits(kind[1:]))}"]
            declared = []
            for register in split(names):
                m = re.fullmatch(r"([%\w$]+?)(?:<(\d+)>)?", register)
                declared += [identifier(m[1] + i) for i in (map(str, range(int(m[2]))) if m[2] else [""])]
            return f"{kind} {', '.join(declared)};"
        if name == ".local":
            m = re.fullmatch(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", operands.strip())
            self.arrays.add(m[2])
            return f"alignas({m[1]}) char {identifier(m[2])}[{m[3]}];"
        if name in (".shared", ".pragma", ".branchtargets"):
            return ""
        raise Unsupported(f"{self.name}: unsupported directive {name} {operands}")

    def instruction(self, name: str, operands: list[str]) -> str:
        op, *modifiers = name.split(".")
        kinds = [m for m in modifiers if m in TYPES]
        handler = getattr(self, f"op_{op}", None)
        if handler:
            return handler(modifiers, operands, *kinds[-1:])
        if (carrying := CARRYING.fullmatch(name)) and (carrying[2] or carrying[4]):
            return self.carrying(*carrying.groups(), *operands)
        if "f32x2" in modifiers:
            return self.write(operands[0], f"{op}_f32x2({', '.join(map(self.value, operands[1:]))})")
        form = ".".join([op, *(m for m in modifiers if m in FORMS)])
        function, pair = form.replace(".", "_") + "_", one_of(modifiers, ("f16x2", "bf16x2"), "")
        if form not in FUNCTIONS or set(modifiers) - {*FORMS, *kinds, pair} - WITHOUT_EFFECT:
            raise Unsupported
        if pair and FUNCTIONS[form] == "t" * len(operands[1:]):
            of = TYPES[pair.removesuffix("x2")]
            each = f"[](auto... v) {{ return {function}<{of}>(v...); }}"
            return self.write(operands[0], f"each_low<{of}>({', '.join([each, *map(self.value, operands[1:])])})")
        (kind,) = kinds
        types = dict(t=kind, u="u32", p="pred", w=f"{kind[0]}{2 * bits(kind)}")
        values = [self.read(o, types[t]) for o, t in zip(operands[1:], FUNCTIONS[form], strict=True)]
        return self.write(operands[0], f"{function}<{TYPES[kind]}>({', '.join(values)})", kind)

    def carrying(self, op, takes, half, gives, kind, to, *operands):
        a, b, *c = (self.read(o, kind) for o in operands)
        if op == "mad":
            a, (b,) = f"mul_{half}_<{TYPES[kind]}>({a}, {b})", c
        elif half or c:
            raise Unsupported
        function = "sub_carry" if op == "sub" else "add_carry"
        code = f"{function}<{TYPES[kind]}>({a}, {b}, {'carry' if takes else 'false'}, {'carry' if gives else 'unused'})"
        return f"{{ [[maybe_unused]] bool unused; {self.write(to, code)} }}"

    def op_mov(self, modifiers, operands, kind):
        to, parts = elements(operands[0]), elements(operands[1])
        if len(to) > 1:
            writes = [self.write(t, f"v >> {bits(kind) // len(to) * i}") for i, t in enumerate(to)]
            return f"{{ const uint64_t v = {self.value(parts[0])}; {' '.join(writes)} }}"
        if len(parts) > 1:
            width = bits(kind) // len(parts)
            joined = [f"low({self.value(p)}, {width}) << {width * i}" for i, p in enumerate(parts)]
            return self.write(to[0], " | ".join(joined))
        return self.write(to[0], self.read(parts[0], "pred") if kind == "pred" else self.value(parts[0]))

    def op_cvta(self, modifiers, operands, kind):
        value = f"uint64_t({self.value(operands[1])})"
        where = dict(shared="space", local="local").get(one_of(modifiers, SPACES))
        if where:  # an offset there, an address elsewhere
            value += f" {'-' if 'to' in modifiers else '+'} uint64_t({where})"
        return self.write(operands[0], value)

    def moved(self, modifiers, parts, kind):
        """Of a load or store: the space, and that its name is one of the known ones."""
        known = {kind, *SPACES, *HINTS, *ELEMENTS}
        if {m.split("::")[0] for m in modifiers} - known:
            raise Unsupported
        if len(parts) != ELEMENTS[one_of(modifiers, ELEMENTS)] if {*ELEMENTS} & {*modifiers} else len(parts) != 1:
            raise Unsupported
        return one_of(modifiers, SPACES, "generic")

    def op_ld(self, modifiers, operands, kind):
        size = bits(kind) // 8
        space = self.moved(modifiers, elements(operands[0]), kind)
        loads = [
            self.write(to, f"load<{TYPES[kind]}>(p + {size * i})", kind) for i, to in enumerate(elements(operands[0]))
        ]
        return f"{{ const char* p = {self.checked(operands[1], space, size * len(loads))}; {' '.join(loads)} }}"

    def op_st(self, modifiers, operands, kind):
        size = bits(kind) // 8
        space = self.moved(modifiers, elements(operands[1]), kind)
        values = [self.read(v, kind) for v in elements(operands[1])]
        stores = [f"store<{TYPES[kind]}>(p + {size * i}, {v});" for i, v in enumerate(values)]
        return f"{{ char* p = {self.checked(operands[0], space, size * len(stores))}; {' '.join(stores)} }}"

    def op_setp(self, modifiers, operands, kind):
        test, flip = modifiers[0], ""
        a, b = (self.number(o, f"u{kind[1:]}" if test in UNSIGNED else kind) for o in operands[1:3])
        unordered = f"unordered({a}, {b})"
        if test in ("num", "nan"):
            code = ("!" if test == "num" else "") + unordered
        elif kind in FLOATS and test not in COMPARISONS:  # equ, ltu, ...: true of NaN as well
            code = f"({a} {COMPARISONS[test.removesuffix('u')]} {b} || {unordered})"
        else:
            flip = f" && !{unordered}" if kind in FLOATS and test == "ne" else ""
            code = f"({a} {COMPARISONS[UNSIGNED.get(test, test)]} {b}{flip})"
        to, *complement = operands[0].split("|")
        code, negated = f"({code})", f"(!{code})"
        if len(operands) > 3:
            join = JOINS[one_of(modifiers, JOINS)]
            code, negated = (f"({c} {join} {self.read(operands[3], 'pred')})" for c in (code, negated))
        if not complement:
            return self.write(to, code)
        return f"{{ const bool t = {code}, f = {negated}; {self.write(to, 't')} {self.write(complement[0], 'f')} }}"

    def op_cvt(self, modifiers, operands, kind):
        if modifiers == ["rna", "tf32", "f32"]:
            return self.write(operands[0], f"cvt_rna_tf32({self.read(operands[1], 'f32')})")
        for pair in ("bf16x2", "f16x2"):
            if pair in modifiers and modifiers[-1] == "f32" and "relu" not in modifiers:
                high, low = (self.read(o, "f32") for o in operands[1:])
                return self.write(operands[0], f"pair<{TYPES[pair[:-2]]}>({low}, {high})")
        to, of = (m for m in modifiers if m in TYPES)
        if set(modifiers) - {to, of, "sat", *ROUNDINGS} - WITHOUT_EFFECT:
            raise Unsupported
        how = f"Rounding::{one_of(modifiers, ROUNDINGS, 'none')}, {'true' if 'sat' in modifiers else 'false'}"
        return self.write(operands[0], f"cvt<{TYPES[to]}>({self.read(operands[1], of)}, {how})", to)

    # ---- control ----
    def op_bra(self, modifiers, operands):
        return f"goto {identifier(operands[0])};"

    def op_brx(self, modifiers, operands):
        cases = " ".join(f"case {i}: goto {identifier(to)};" for i, to in enumerate(self.tables[operands[1]]))
        return f"switch ({self.u32(operands[0])}) {{ {cases} }}"

    def op_ret(self, modifiers, operands):
        return "return;"

    op_exit = op_ret

    def op_bar(self, modifiers, operands, kind=None):
        if modifiers[0] == "warp":
            return f"warp_barrier({self.u32(operands[0])}, HERE);"
        if "red" in modifiers and len(operands) == 3:
            how, vote = one_of(modifiers, VOTES), self.read(operands[2], "pred")
            return self.write(operands[0], VOTES[how].format(f"barrier({vote}, HERE)", f"barrier(!{vote}, HERE)"))
        if "sync" not in modifiers:
            raise Unsupported
        if len(operands) > 1:
            return f"named_barrier(int({self.u32(operands[0])}), int({self.u32(operands[1])}), HERE);"
        if operands != ["0"]:
            raise Unsupported
        return "barrier(false, HERE);"

    op_barrier = op_bar

    def op_membar(self, modifiers, operands):
        return "fence();"

    op_fence = op_membar

    def op_trap(self, modifiers, operands):
        return 'fail(HERE, "trap");'

    def op_createpolicy(self, modifiers, operands, kind):  # for a cache, which the host does not ask
        return self.write(operands[0], "0")

    def op_prefetch(self, modifiers, operands):
        return "(void)0;"

    op_griddepcontrol = op_discard = op_prefetch

    # ---- warps ----
    def op_shfl(self, modifiers, operands, kind):
        value, lane, limits, mask = map(self.u32, operands[1:5])
        to, *valid = operands[0].split("|")
        how = SHUFFLES.index(one_of(modifiers, SHUFFLES))
        code = f"bool valid; {self.write(to, f'shfl<{how}>({value}, {lane}, {limits}, {mask}, valid, HERE)')}"
        return f"{{ {' '.join([code, *(self.write(v, 'valid') for v in valid)])} }}"

    def op_vote(self, modifiers, operands, kind):
        mask = self.u32(operands[2])
        ballot = f"ballot({mask}, {self.read(operands[1], 'pred')}, HERE)"
        test = dict(ballot="", any=" != 0", all=f" == {mask}")[one_of(modifiers, ("ballot", "any", "all"))]
        return self.write(operands[0], ballot + test)

    def op_redux(self, modifiers, operands, kind):
        t = TYPES[kind]
        reduce = f"[]({t} old, {t} x) {{ return {t}({REDUX[one_of(modifiers, REDUX)]}); }}"
        value, mask = self.read(operands[1], kind), self.u32(operands[2])
        return self.write(operands[0], f"redux<{t}>({value}, {mask}, {reduce}, HERE)")

    def op_ldmatrix(self, modifiers, operands, kind):
        to = elements(operands[0])
        if "m8n8" not in modifiers or kind != "b16":
            raise Unsupported
        how = f"{len(to)}, {'true' if 'trans' in modifiers else 'false'}"
        writes = " ".join(self.write(t, f"r[{i}]") for i, t in enumerate(to))
        return f"{{ uint32_t r[{len(to)}]; ldmatrix<{how}>(r, {self.address(operands[1], 'shared')}, HERE); {writes} }}"

    def op_mma(self, modifiers, operands, *kinds):
        (shape,) = (m for m in modifiers if m[0] == "m" and m[1].isdigit())
        if modifiers == ["sync", "aligned", "m8n8k4", "row", "col", *["f64"] * 4]:
            a, b = (self.read(*elements(o), "f64") for o in operands[1:3])
            c_values = ", ".join(self.read(o, "f64") for o in elements(operands[3]))
            writes = " ".join(self.write(to, f"d[{i}]", "f64") for i, to in enumerate(elements(operands[0])))
            return f"{{ double d[] = {{{c_values}}}; mma_m8n8k4(d, {a}, {b}, HERE); {writes} }}"
        depth, (d, a, b, c) = int(shape.removeprefix("m16n8k")), modifiers[-4:]
        if (a, d, c) != (b, "f32", "f32") or modifiers[:2] != ["sync", "aligned"] or modifiers[3:5] != ["row", "col"]:
            raise Unsupported
        a_words, b_words = (", ".join(map(self.u32, elements(o))) for o in operands[1:3])
        c_values = ", ".join(self.read(o, "f32") for o in elements(operands[3]))
        writes = " ".join(self.write(to, f"d[{i}]", "f32") for i, to in enumerate(elements(operands[0])))
        call = f"mma(Element::{MMA[a]}, {depth}, d, {{{a_words}}}, {{{b_words}}}, HERE);"
        return f"{{ float d[] = {{{c_values}}}; {call} {writes} }}"

    # ---- memory ----
    def op_cp(self, modifiers, operands):
        if modifiers[0] != "async" or {"bulk", "mbarrier"} & {*modifiers}:
            raise Unsupported
        if "commit_group" in modifiers:
            return "cp_async_commit();"
        if "wait_group" in modifiers:
            return f"cp_async_wait(int({self.u32(operands[0])}));"
        if "wait_all" in modifiers:
            return "cp_async_commit(); cp_async_wait(0);"
        hinted = any("cache_hint" in m for m in modifiers)
        to, of, size, *given = operands[: len(operands) - hinted]
        if int(size, 0) not in (4, 8, 16) or len(given) > 1:
            raise Unsupported
        if given and not re.fullmatch(r"%rs?\d+|\d+", given[0]):  # a predicate here means something else
            raise Unsupported
        to, of = self.address(to, "shared"), self.address(of, "global")
        taken = self.u32(given[0] if given else size)
        check = f"check_global({of}, {taken}, HERE)"
        return f"{{ if ({taken}) {check}; cp_async({to}, {of}, {int(size, 0)}, {taken}, HERE); }}"

    def op_atom(self, modifiers, operands, kind):
        return self.atomic(modifiers, TYPES[kind], kind, *operands)

    def op_red(self, modifiers, operands, kind):
        return self.atomic(modifiers, TYPES[kind], kind, "_", *operands)

    def atomic(self, modifiers, t, kind, to, place, *values):
        names = ", ".join(f"{n} = {self.read(v, kind)}" for n, v in zip("xy", values, strict=False))
        p = f"({t}*){self.checked(place, one_of(modifiers, SPACES, 'generic'), bits(kind) // 8)}"
        change = f"[=]({t} old) {{ return {t}({ATOMICS[one_of(modifiers, ATOMICS)]}); }}"
        return f"{{ const {t} {names}; {self.write(to, f'update({p}, {change})', kind)} }}"

    # ---- the whole ----
    def translate(self, text: str, at: int) -> str:
        """The kernel whose body begins at that place, as C++."""
        code, depth = [], 0
        while True:
            m = STATEMENT.match(text, at)
            if not m:
                raise Unsupported(f"{self.name}: cannot read {text[at : at + 80].strip()}")
            at = m.end()
            code.append(self.statement(m))
            depth += {"{": 1, "}": -1}.get(m["brace"], 0)
            if not depth:
                break
        shared = []
        for name in sorted(self.used):
            place = f"shared_variable({self.shared[name]}, HERE)" if self.shared[name] else "dynamic_shared(HERE)"
            shared.append(f"const uint32_t {identifier(name)} = static_cast<char*>({place}) - space;")
        function, layout = identifier(self.name), ", ".join(f"{{{o}, {n}}}" for o, n in self.parameters.values())
        return f"""\
static void {function}([[maybe_unused]] const char* parameters) {{
[[maybe_unused]] char* const space = shared_space();
[[maybe_unused]] char* const local = static_cast<char*>(__builtin_frame_address(0)) - (1 << 20);  // below all arrays
[[maybe_unused]] bool carry = false;
{NEWLINE.join(shared)}
{NEWLINE.join(filter(None, code))}
}}
#line 1 "{self.name}"
static const Registration registration{function}("{self.name}", {function}, {{{layout}}});
"""


class Text:
    """What kernels of one text share."""

    def __init__(self, text: str):
        self.files = {m[1]: m[2].rpartition("/")[2] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text.partition("\t.section")[0], flags=re.S)
        self.text = text
        self.tables = {m[1]: split(m[2]) for m in re.finditer(r"([$\w]+):\s*\.branchtargets([^;]*);", text)}
        self.shared = {}  # bytes, of arrays and variables
        for m in re.finditer(r"\.shared\s+\.align\s+\d+\s+\.(\w+)\s+([\w$]+)(\[(\d*)\])?", text):
            self.shared[m[2]] = bits(m[1]) // 8 * (int(m[4] or 0) if m[3] else 1)
        self.variables = {}  # of global memory, in C++
        for m in re.finditer(
            r"\.global\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?(?:\s*=\s*([^;]*))?;", text
        ):
            name, values = identifier(m[3]), (m[5] or "").strip("{} \n")
            if not re.fullmatch(r"[\s\w,-]*", values):
                raise Unsupported(f"unsupported initial value of {m[3]}: {values}")
            self.variables[m[3]] = (
                f"alignas({m[1]}) static {TYPES[f'u{bits(m[2])}']} {name}[{m[4] or 1}] = {{{values}}};\n"
                f"static const Variable variable{name}({name}, sizeof {name});\n"
            )


def translate(source: str) -> str:
    text = Text(source)
    kernels = [
        Kernel(m[1], m[2], text).translate(text.text, m.end())
        for m in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{;]*", text.text, re.S)
    ]
    if not kernels:
        raise Unsupported("no kernel")
    parts = ["using namespace host_cuda;\nusing namespace host_cuda::ptx;\n", *text.variables.values(), *kernels]
    return '#include "host_cuda/ptx.h"\n' + "".join(parts)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    try:
        with open(source) as ptx:
            code = translate(ptx.read())
    except Unsupported as e:
        sys.exit(f"{source}: {e}")
    with open(target, "w") as cpp:
        cpp.write(code)
