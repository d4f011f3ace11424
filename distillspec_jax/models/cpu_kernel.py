"""A product of few rows for the host's own vector registers, which XLA calls as a foreign function.

    for each strip of the weights' lines          12 to 128 lines
      for each tile of outputs                    as many vectors as the registers hold
        for each group of rows                    8 of them; the tile's weights stay in the cache
          for each line of the strip              every weight is fetched once, some tiles ahead
            add x[row, line] * weights[line, tile] for each row of the group

The threads of XLA's pool share the lines, half and half, so that each reads on in order; more than
two of them share the outputs as well. The sums of both halves are added at the end. Transposed
weights have a line for each output: there threads share the outputs alone, a tile is a few lines,
and the sums of their vectors are taken at their ends. LLVM's intermediate code is built by llvmlite
and compiled at the first use of a number of rows, in about 0.1 s.

Shapes: G products of M rows, K inputs, F outputs; x [..., M, K], weights [..., K, F] or,
transposed, [..., F, K], y [..., M, F], all float32; the axes in front multiply to G. A tile reads
whole vectors: the last axis of the weights is a multiple of `LANES`. A kernel with ends takes [G]
int32, too: of each product only so many lines of the weights are read, and transposed the outputs
behind them stay as they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import llvmlite.binding as llvm
from llvmlite import ir

GROUP = 8  # rows whose outputs share the registers
SHARED = 2**16  # weights: fewer are not worth waking a second thread for

_FEATURES = llvm.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx2") else 4  # float32 a register
REGISTERS = 16 if LANES == 8 else 32
# Lines of weights between two visits of a tile: of FEW rows, for which reading is the cost, as many
# as the processor follows as it fetches ahead (AMD's loses track of more); of a group; of several.
FEW = 4
STRIPS = (12, 32, 128) if llvm.get_host_cpu_name().startswith("znver") else (32, 32, 64)
AHEAD = 64  # lines of tiles to come that are fetched into the second-level cache: at least a tile's
HALVED = 32  # lines: what half of them is a multiple of

BYTE, INT, LONG, VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.VoidType()
FLOAT, POINTER = ir.FloatType(), BYTE.as_pointer()
VECTOR = ir.VectorType(FLOAT, LANES)
NULL, ZERO = POINTER(None), ir.Constant(VECTOR, [0.0] * LANES)

# Byte offsets in XLA's foreign function interface, version 0 (jaxlib/include/xla/ffi/api/c_api.h),
# whose structures grow at their ends only.
VERSION, ASKS_VERSION = (0, 1), 1
KIND, METADATA, MAJOR, MINOR = 8, 24, 24, 28  # of an extension; of the metadata it asks for
EXTENSION, API, CONTEXT, ARGUMENTS, RESULTS = 8, 16, 24, 72, 112  # of a call
SCHEDULE, COUNT_THREADS = 136, 144  # of the API
DATA, RANK, DIMENSIONS = 24, 32, 40  # of a buffer

# Of a job, which lives until the last thread lets go of it.
X, WEIGHTS, Y, ROWS, INPUTS, OUTPUTS, PART, HALF, SPLITS, PARTS, NEXT, DONE, HOLDERS, ENDS, SUMS = (
    range(0, 120, 8)
)  # the sums of the second half of the lines stand behind the job


_ENGINES: list[Any] = []  # they own the compiled code
_LOCK = threading.Lock()


def register(rows: int, transposed: bool, has_ends: bool) -> str:
    """Compiles the kernel for so many rows unless it is there; the name that XLA knows it by."""
    group = min(rows, GROUP)
    with _LOCK:
        return _registered(group, rows % group, transposed, has_ends)


@functools.cache
def _registered(group: int, rest: int, transposed: bool, has_ends: bool) -> str:
    name = f"distillspec_product_{group}_{rest}"
    name += "_transposed" * transposed + "_ends" * has_ends
    machine = _machine()
    module = llvm.parse_assembly(str(_Kernel(name, group, rest, transposed, has_ends).module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(engine.get_function_address(name))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    name = llvm.get_host_cpu_name()
    return target.create_target_machine(name, _FEATURES.flatten(), opt=3)


_flat = itertools.chain.from_iterable


class _Kernel:
    """LLVM's intermediate code of one kernel, as three functions.

        handler(call)  what XLA calls: asks for help, works, waits for the parts of others
        help(job)      what a thread of XLA's pool runs: works and lets go
        work(job)      takes parts of the outputs until none is left

    A thread that comes late finds no part left, and nobody waits for it: the pool may be busy.
    """

    def __init__(self, name: str, group: int, rest: int, transposed: bool, has_ends: bool) -> None:
        self.module = ir.Module(name)
        self.group, self.rest = group, rest
        self.transposed, self.has_ends = transposed, has_ends
        vectors = max(1, min(4, (REGISTERS - 1) // (group + 1)))  # of a tile, for each row
        self.wide = vectors if transposed else vectors * LANES
        self.work = self._function("work", VOID, [POINTER])
        self._build_work()
        self.help = self._function("help", VOID, [POINTER])
        self._build_help()
        self._build_handler(self._function(name, POINTER, [POINTER]))

    def _function(self, name: str, result: Any, arguments: list[Any]) -> Any:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def _enter(self, function: Any) -> Any:
        self.code = ir.IRBuilder(function.append_basic_block())
        return function.args[0]

    def _field(self, base: Any, offset: int, kind: Any = None) -> Any:
        """The place of a field, as a pointer to `kind`, a pointer if None."""
        place = self.code.gep(base, [LONG(offset)])
        return self.code.bitcast(place, (kind or POINTER).as_pointer())

    def _get(self, base: Any, offset: int, kind: Any = None) -> Any:
        return self.code.load(self._field(base, offset, kind))

    def _build_handler(self, handler: Any) -> None:
        call, code = self._enter(handler), self.code
        extension = self._get(call, EXTENSION)
        with code.if_then(code.icmp_unsigned("!=", extension, NULL)):
            kind = self._get(extension, KIND, INT)
            with code.if_then(code.icmp_unsigned("==", kind, INT(ASKS_VERSION))):
                metadata = self._get(extension, METADATA)
                for offset, number in zip((MAJOR, MINOR), VERSION, strict=True):
                    code.store(INT(number), self._field(metadata, offset, INT))
                code.ret(NULL)

        arguments, results = self._get(call, ARGUMENTS), self._get(call, RESULTS)
        x, weights, y = self._get(arguments, 0), self._get(arguments, 8), self._get(results, 0)
        _, rows, _ = self._sizes(x)
        products, inputs, outputs = self._sizes(weights)
        if self.transposed:
            inputs, outputs = outputs, inputs
        threads = self._threads(call, code.mul(products, code.mul(inputs, outputs)))
        half, splits = self._split(products, inputs, threads)
        halves = self._ceil(inputs, half)
        wide = LONG(self.wide)
        part = code.mul(self._ceil(self._ceil(outputs, wide), splits), wide)
        splits = code.mul(self._ceil(outputs, part), halves)
        parts = code.mul(products, splits)
        size = code.mul(rows, outputs)
        sums = code.mul(size, code.sub(halves, LONG(1)))
        room = code.add(code.mul(sums, LONG(4)), LONG(SUMS))
        job = code.call(self._function("malloc", POINTER, [LONG]), [room])
        for buffer, offset in ((x, X), (weights, WEIGHTS), (y, Y)):
            code.store(self._get(buffer, DATA), self._field(job, offset))
        if self.has_ends:
            code.store(self._get(self._get(arguments, 16), DATA), self._field(job, ENDS))
        numbers = {ROWS: rows, INPUTS: inputs, OUTPUTS: outputs, HOLDERS: threads, HALF: half}
        numbers |= {PART: part, SPLITS: splits, PARTS: parts, NEXT: LONG(0), DONE: LONG(0)}
        for offset, value in numbers.items():
            code.store(value, self._field(job, offset, LONG))

        schedule = self._get(self._get(call, API), SCHEDULE)
        fields = [LONG(40), NULL, self._get(call, CONTEXT), code.bitcast(self.help, POINTER), job]
        with self._loop(LONG(1), threads, 1):
            self._call_api(schedule, fields)
        code.call(self.work, [job])
        waiting, finished = code.append_basic_block(), code.append_basic_block()
        code.branch(waiting)
        code.position_at_end(waiting)
        done = code.load_atomic(self._field(job, DONE, LONG), "acquire", 8)
        code.cbranch(code.icmp_unsigned("<", done, parts), waiting, finished)
        code.position_at_end(finished)
        self._add_second(self._get(y, DATA, FLOAT.as_pointer()), job, sums)
        self._let_go(job)
        code.ret(NULL)

    def _split(self, products: Any, inputs: Any, threads: Any) -> tuple[Any, Any]:
        """Lines of a part, and among how many its outputs are split.

        Neither knows the number of rows, so that a row's sums do not depend on the others.
        """
        code = self.code
        alone = code.icmp_unsigned("<", products, threads)
        splits = code.select(alone, threads, LONG(1))
        if self.transposed or self.has_ends:
            return inputs, splits
        halved = code.and_(alone, code.icmp_unsigned("==", products, LONG(1)))
        half = code.mul(self._ceil(inputs, LONG(2 * HALVED)), LONG(HALVED))
        even = code.icmp_unsigned("==", code.urem(threads, LONG(2)), LONG(0))
        fewer = code.select(even, code.udiv(threads, LONG(2)), threads)
        return code.select(halved, half, inputs), code.select(halved, fewer, splits)

    def _add_second(self, y: Any, job: Any, count: Any) -> None:
        """Adds what the second half of the lines gave, `count` sums, to that of the first."""
        second = self._field(job, SUMS, FLOAT)
        with self._loop(LONG(0), count, LANES) as place:
            value = self.code.fadd(self._load(y, place), self._load(second, place))
            self.code.store(value, self._vector(y, place), align=4)

    def _sizes(self, buffer: Any) -> tuple[Any, Any, Any]:
        """The product of all sizes but two, and the last two."""
        code = self.code
        dimensions = code.bitcast(self._get(buffer, DIMENSIONS), LONG.as_pointer())
        leading = code.sub(self._get(buffer, RANK, LONG), LONG(2))
        with code.goto_entry_block():
            count = code.alloca(LONG)
        code.store(LONG(1), count)
        with self._loop(LONG(0), leading, 1) as axis:
            size = code.load(code.gep(dimensions, [axis]))
            code.store(code.mul(code.load(count), size), count)
        last = [code.load(code.gep(dimensions, [code.add(leading, LONG(i))])) for i in (0, 1)]
        return code.load(count), last[0], last[1]

    def _ceil(self, number: Any, by: Any) -> Any:
        code = self.code
        return code.udiv(code.sub(code.add(number, by), LONG(1)), by)

    def _threads(self, call: Any, size: Any) -> Any:
        """How many threads share a product with `size` weights."""
        code = self.code
        with code.goto_entry_block():
            count = code.alloca(LONG)
        code.store(LONG(1), count)
        with code.if_then(code.icmp_unsigned(">=", size, LONG(SHARED))):
            ask = self._get(self._get(call, API), COUNT_THREADS)
            place = code.bitcast(count, POINTER)
            self._call_api(ask, [LONG(32), NULL, self._get(call, CONTEXT), place])
        return code.load(count)

    def _call_api(self, function: Any, fields: list[Any]) -> None:
        """Calls one of XLA's functions with a structure of eight-byte fields."""
        code = self.code
        with code.goto_entry_block():
            structure = code.bitcast(code.alloca(LONG, len(fields)), POINTER)
        for index, value in enumerate(fields):
            code.store(value, self._field(structure, 8 * index, value.type))
        kind = ir.FunctionType(POINTER, [POINTER])
        code.call(code.bitcast(function, kind.as_pointer()), [structure])

    def _build_help(self) -> None:
        job = self._enter(self.help)
        self.code.call(self.work, [job])
        self._let_go(job)
        self.code.ret_void()

    def _let_go(self, job: Any) -> None:
        code = self.code
        holders = code.atomic_rmw("sub", self._field(job, HOLDERS, LONG), LONG(1), "acq_rel")
        with code.if_then(code.icmp_unsigned("==", holders, LONG(1))):
            code.call(self._function("free", VOID, [POINTER]), [job])

    def _build_work(self) -> None:
        job, code = self._enter(self.work), self.code
        self.rows, self.inputs, self.outputs = (
            self._get(job, at, LONG) for at in (ROWS, INPUTS, OUTPUTS)
        )
        part, half, splits, parts = (self._get(job, at, LONG) for at in (PART, HALF, SPLITS, PARTS))
        taking, working, leaving = (code.append_basic_block() for _ in range(3))
        code.branch(taking)
        code.position_at_end(taking)
        taken = code.atomic_rmw("add", self._field(job, NEXT, LONG), LONG(1), "monotonic")
        code.cbranch(code.icmp_unsigned("<", taken, parts), working, leaving)
        code.position_at_end(working)
        number, split = code.udiv(taken, splits), code.urem(taken, splits)
        sizes = {
            X: code.mul(self.rows, self.inputs),
            WEIGHTS: code.mul(self.inputs, self.outputs),
            Y: code.mul(self.rows, self.outputs),
        }
        self.x, self.weights, self.y = (
            code.gep(self._get(job, at, FLOAT.as_pointer()), [code.mul(number, size)])
            for at, size in sizes.items()
        )
        self.lines = self.outputs if self.transposed else self.inputs
        if self.has_ends:
            end = code.load(code.gep(self._get(job, ENDS, INT.as_pointer()), [number]))
            self.lines = self._least(code.sext(end, LONG), self.lines)
        halves = self._ceil(self.inputs, half)
        first = code.mul(code.udiv(split, halves), part)
        if self.transposed:
            last = self._least(code.add(first, part), self.lines)
            self._lines(self._least(first, last), last)
        else:
            self.begin = code.mul(code.urem(split, halves), half)
            self.lines = self._least(code.add(self.begin, half), self.lines)
            is_first = code.icmp_unsigned("==", self.begin, LONG(0))
            self.y = code.select(is_first, self.y, self._field(job, SUMS, FLOAT))
            self._columns(first, self._least(code.add(first, part), self.outputs))
        code.atomic_rmw("add", self._field(job, DONE, LONG), LONG(1), "release")
        code.branch(taking)
        code.position_at_end(leaving)
        code.ret_void()

    def _least(self, a: Any, b: Any) -> Any:
        return self.code.select(self.code.icmp_unsigned("<", a, b), a, b)

    def _of_rows(self, build: Callable[[Any, int], None]) -> None:
        """build(row, count) for `count` rows from `row` on, group by group, and for the rest."""
        whole = self.code.sub(self.rows, LONG(self.rest))
        with self._loop(LONG(0), whole, self.group) as row:
            build(row, self.group)
        if self.rest:
            build(whole, self.rest)

    def _lines(self, first: Any, last: Any) -> None:
        """Outputs first..last of transposed weights, a few lines of them at a time."""
        code = self.code
        whole = code.sub(last, code.urem(code.sub(last, first), LONG(self.wide)))
        for start, stop, lines in ((first, whole, self.wide), (whole, last, 1)):
            with self._loop(start, stop, lines) as line:
                self._of_rows(functools.partial(self._dots, line, lines))

    def _dots(self, line: Any, lines: int, row: Any, rows: int) -> None:
        """Some rows times some lines of the weights, each sum in a vector until its end."""
        code = self.code
        sums = self._sums(rows, lines)
        for total in _flat(sums):
            code.store(ZERO, total)
        starts = [code.mul(code.add(line, LONG(i)), self.inputs) for i in range(lines)]
        mine = [code.mul(code.add(row, LONG(i)), self.inputs) for i in range(rows)]
        with self._loop(LONG(0), self.inputs, LANES) as k:
            weights = [self._load(self.weights, code.add(start, k)) for start in starts]
            below = code.add(k, code.mul(LONG(lines), self.inputs))
            for start in starts:  # the next tile's
                self._prefetch(code.gep(self.weights, [code.add(start, below)]))
            for start, totals in zip(mine, sums, strict=True):
                self._add(self._load(self.x, code.add(start, k)), weights, totals)
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        reduce = self._function(name, FLOAT, [FLOAT, VECTOR])
        for i, totals in enumerate(sums):
            place = code.add(code.mul(code.add(row, LONG(i)), self.outputs), line)
            for j, total in enumerate(totals):
                value = code.call(reduce, [FLOAT(0), code.load(total)], fastmath=("reassoc",))
                code.store(value, code.gep(self.y, [code.add(place, LONG(j))]))

    def _columns(self, first: Any, last: Any) -> None:
        """Outputs first..last, strip by strip; in a strip tile by tile, for all rows."""
        code = self.code
        whole = code.sub(last, code.urem(code.sub(last, first), LONG(self.wide)))
        few, some, many = STRIPS
        of_group = few if self.group <= FEW else some
        is_one = code.icmp_unsigned("<=", self.rows, LONG(GROUP))
        height = code.select(is_one, LONG(of_group), LONG(many))
        tiles = code.select(is_one, *(LONG(max(1, AHEAD // each)) for each in (of_group, many)))
        with self._loop(self.begin, self.lines, height) as strip:
            below = code.add(strip, height)
            end = self._least(below, self.lines)
            for start, stop, width in ((first, whole, self.wide), (whole, last, LANES)):
                with self._loop(start, stop, width) as column:
                    ahead = code.add(column, code.mul(tiles, LONG(self.wide)))
                    ahead = self._place(ahead, strip, below, first, last)
                    self._of_rows(functools.partial(self._tile, strip, end, column, width, ahead))

    def _place(self, column: Any, strip: Any, below: Any, first: Any, last: Any) -> Any:
        """Of a column of a strip's first line; behind the last column that of the next strip."""
        code = self.code
        is_here = code.icmp_unsigned("<", column, last)
        wrapped = code.sub(column, code.sub(last, first))
        line, column = code.select(is_here, strip, below), code.select(is_here, column, wrapped)
        return code.add(code.mul(line, self.outputs), column)

    def _tile(
        self, strip: Any, end: Any, column: Any, width: int, ahead: Any, row: Any, rows: int
    ) -> None:
        """Adds what the weights' lines strip..end give to `width` outputs of some rows."""
        code = self.code
        offsets = range(0, width, LANES)
        sums = self._sums(rows, len(offsets))
        mine = [code.add(row, LONG(i)) for i in range(rows)]
        lines = [code.add(code.mul(each, self.outputs), column) for each in mine]
        places = [self._vector(self.y, line, offset) for line in lines for offset in offsets]
        begins = code.icmp_unsigned("==", strip, self.begin)
        for place, total in zip(places, _flat(sums), strict=True):
            code.store(code.select(begins, ZERO, code.load(place, align=4)), total)
        starts = [code.mul(each, self.inputs) for each in mine]
        with self._loop(strip, end, 1) as k:
            line = code.add(code.mul(k, self.outputs), column)
            weights = [self._load(self.weights, line, offset) for offset in offsets]
            to_come = code.add(ahead, code.mul(code.sub(k, strip), self.outputs))
            for offset in range(0, width, 16):  # a cache line each
                self._prefetch(code.gep(self.weights, [code.add(to_come, LONG(offset))]))
            for start, totals in zip(starts, sums, strict=True):
                x = self._spread(code.load(code.gep(self.x, [code.add(start, k)])))
                self._add(x, weights, totals)
        for place, total in zip(places, _flat(sums), strict=True):
            code.store(code.load(total), place, align=4)

    def _sums(self, rows: int, count: int) -> list[list[Any]]:
        """Places for `count` vectors a row, which LLVM turns into registers."""
        with self.code.goto_entry_block():
            return [[self.code.alloca(VECTOR) for _ in range(count)] for _ in range(rows)]

    def _add(self, x: Any, weights: list[Any], totals: list[Any]) -> None:
        for part, total in zip(weights, totals, strict=True):
            self.code.store(self._fma(x, part, self.code.load(total)), total)

    def _vector(self, base: Any, index: Any, offset: int = 0) -> Any:
        place = self.code.gep(base, [self.code.add(index, LONG(offset))])
        return self.code.bitcast(place, VECTOR.as_pointer())

    def _load(self, base: Any, index: Any, offset: int = 0) -> Any:
        return self.code.load(self._vector(base, index, offset), align=4)

    def _spread(self, number: Any) -> Any:
        """A vector that holds `number` in every lane."""
        undefined = ir.Constant(VECTOR, ir.Undefined)
        first = self.code.insert_element(undefined, number, INT(0))
        lanes = ir.Constant(ir.VectorType(INT, LANES), [0] * LANES)
        return self.code.shuffle_vector(first, undefined, lanes)

    def _fma(self, a: Any, b: Any, c: Any) -> Any:
        fma = self._function(f"llvm.fma.v{LANES}f32", VECTOR, [VECTOR] * 3)
        return self.code.call(fma, [a, b, c])

    def _prefetch(self, place: Any) -> None:
        fetch = self._function("llvm.prefetch.p0", VOID, [POINTER, INT, INT, INT])
        flags = [INT(flag) for flag in (0, 2, 1)]  # to read, into the second level, data
        self.code.call(fetch, [self.code.bitcast(place, POINTER), *flags])

    @contextlib.contextmanager
    def _loop(self, start: Any, end: Any, step: Any) -> Iterator[Any]:
        """for (index = start; index < end; index += step) around what the caller builds."""
        code = self.code
        before = code.block
        head, body, after = (code.append_basic_block() for _ in range(3))
        code.branch(head)
        code.position_at_end(head)
        index = code.phi(LONG)
        index.add_incoming(start, before)
        code.cbranch(code.icmp_unsigned("<", index, end), body, after)
        code.position_at_end(body)
        yield index
        step = LONG(step) if isinstance(step, int) else step
        index.add_incoming(code.add(index, step), code.block)
        code.branch(head)
        code.position_at_end(after)
