"""A plan as tables."""

import math
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from aem_jax.plan.devices import GIB, Topology
from aem_jax.plan.make import Plan

_LABEL = {
    "update": "learning (update)",
    "reshard": "resharding",
    "extend": "prefill (extend)",
    "decode": "sampling (decode)",
}
_UNIT = {
    "update": "learning, a microbatch",
    "reshard": "resharding",
    "extend": "prefill, a chunk",
    "decode": "sampling, a token a slot",
}
_TOKEN = {"update": "learning, a token", "decode": "sampling, a token a slot"}
_CONTENT = {
    "parameters": "masters",
    "frozen": "frozen weights",
    "weights": "weights as sampled from",
    "working": "activations (estimate)",
}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints a plan as tables, on standard output by default."""
    console = console or Console(width=120)
    for line in _head(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in (_memory(plan), _phases(plan), _programs(plan), _floors(plan), _collectives(plan), _rates(plan)):
        if table.row_count:
            console.print(table)
    for line in _end(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _of_all(topology: Topology) -> str:
    """The memory of which JAX may use only a part."""
    everything = topology.chip.memory / topology.chip.cores
    return f" for JAX (of {everything / GIB:.1f})" if topology.memory < everything else ""


def _head(plan: Plan) -> Iterable[str]:
    topology, mesh, work, model = plan.topology, plan.mesh, plan.work, plan.work.model
    active = f" ({model.num_active_parameters / 1e6:,.0f} million active)" if model.mixture else ""
    yield (
        f"{model.num_parameters / 1e6:,.0f} million parameters{active} on {topology.name}: {topology.num_devices} "
        f"devices of {topology.memory / GIB:.1f} GiB{_of_all(topology)}, {topology.peak / 1e12:,.1f} TFLOP/s, "
        f"{topology.bandwidth / 1e12:.2f} TB/s"
    )
    how = "chosen" if plan.chosen else "as given"
    yield (
        f"mesh, {how}: data {mesh.data} × fsdp {mesh.fsdp} × tensor {mesh.tensor}"
        + (f" × expert {mesh.expert}; " if model.mixture else "; ")
        + f"masters in {mesh.fsdp * mesh.expert * mesh.tensor} parts, weights as sampled from in {mesh.tensor}, "
        + (f"experts in {mesh.expert * mesh.tensor}, " if model.mixture else "")
        + f"rows and slots in {mesh.data * mesh.fsdp * mesh.expert}"
    )
    layout = work.layout
    yield (
        f"update: {layout.rows} rows × {layout.row_length} tokens a microbatch, remat {work.remat}; "
        f"sampling: {work.slots} slots × {work.capacity} tokens"
        + (f" in each of {work.cohorts} cohorts" if work.cohorts > 1 else "")
    )
    if plan.analytic:
        yield f"ANALYTIC ({plan.compiler}): closed forms, no program was compiled; times are bounds, not predictions"
    else:
        yield f"compiled by {plan.compiler}, for devices that need not be here"
    if plan.topology.kind == "gpu":
        shares = plan.topology.chip.shares
        yield (
            f"times: at the peaks, and without overlap at {shares.compute:.0%} of FLOP/s, {shares.memory:.0%} of the "
            f"memory's and {shares.wire:.0%} of the wire's bytes/s; nothing is tuned without a GPU"
        )


def _table(*columns: str, title: str, texts: int = 1) -> Table:
    """A table whose columns after the first `texts` ones are numbers."""
    table = Table(*columns, title=title)
    for column in table.columns[texts:]:
        column.justify = "right"
    return table


def _memory(plan: Plan) -> Table:
    table = _table("content of a device", "GiB", title="memory, closed form")
    for name, size in vars(plan.memory).items():
        if size:
            table.add_row(_CONTENT.get(name, name), f"{size / GIB:.2f}")
    return table


def _phases(plan: Plan) -> Table:
    columns = ("during", "arguments", "outputs", "temporaries", "other arrays", "together", "of", "fits")
    table = _table(*columns, title="memory, GiB")
    gib = lambda size: f"{size / GIB:.2f}"
    for name, size in plan.phases.items():
        program = plan.programs.get(name)
        if program is None:
            cells = ["", "", "", "", gib(size)]
        elif program.too_large:
            cells = ["", "", "", "", program.too_large]
        else:
            parts = (program.arguments, program.outputs, program.temporaries, size - program.total, size)
            cells = [gib(part) for part in parts]
        table.add_row(_LABEL[name], *cells, gib(plan.topology.memory), "no" if name in plan.too_large else "yes")
    return table


def _programs(plan: Plan) -> Table:
    columns = ("work of a device", "TFLOP", "of closed form", "GB moved", "GB sent")
    times = ("compute", "memory", "wire", "compiler", "compiled in")
    title = "times in ms: at the device's peaks, and the compiler's estimate of all but the wire"
    table = _table(*columns, *times, title=title)
    for name, cost in plan.costs.items():
        seconds, program, closed = plan.seconds[name], plan.programs.get(name), plan.closed_flops.get(name)
        unit = plan.units.get(name, 1.0)
        sent = math.fsum(one.count * one.bytes for one in cost.collectives if one.group > 1)
        table.add_row(
            _UNIT[name],
            f"{cost.flops / unit / 1e12:,.3f}",
            f"{cost.flops / closed:.0%}" if closed and program else "",
            f"{cost.bytes / unit / 1e9:,.2f}",
            f"{sent / unit / 1e9:,.2f}",
            *(f"{value / unit * 1e3:,.2f}" for value in (seconds.compute, seconds.memory, seconds.wire)),
            f"{seconds.compiler / unit * 1e3:,.2f}" if seconds.compiler else "",
            f"{program.compiled_in:.0f} s" if program else "",
        )
    return table


def _floors(plan: Plan) -> Table:
    """Bytes of a device a token, against what it has to move at least."""
    columns = ("bytes a token, of a device", "moved", "floor", "× the floor", "temporaries, of arguments")
    table = _table(*columns, title="bytes moved a token")
    work, replicas = plan.work, plan.mesh.data * plan.mesh.fsdp * plan.mesh.expert
    tokens = {"update": work.microbatch_tokens / replicas * plan.units["update"], "decode": plan.units["decode"]}
    for name, floor in plan.floors.items():
        if name not in plan.costs:
            continue
        program, moved = plan.programs.get(name), plan.costs[name].bytes
        cells = ("closed form", _size(floor / tokens[name]), "", "")
        if program:
            cells = (_size(moved / tokens[name]), cells[1], f"{moved / floor:.2f}", f"{program.temporary_share:.1%}")
        table.add_row(_TOKEN[name], *cells)
    return table


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _collectives(plan: Plan) -> Table:
    columns = ("collectives of a device", "kind", "over", "times", "MB each", "GB")
    table = _table(*columns, title="collectives", texts=2)
    for name, cost in plan.costs.items():
        unit, sums = plan.units.get(name, 1.0), dict[tuple[str, int], list[float]]()
        for one in cost.collectives:
            entry = sums.setdefault((one.kind, one.group), [0.0, 0.0])
            entry[0] += one.count / unit
            entry[1] += one.count * one.bytes / unit
        for (kind, group), (count, size) in sorted(sums.items(), key=lambda item: -item[1][1]):
            if group > 1 and count:
                sizes = (f"{size / count / 1e6:,.3f}", f"{size / 1e9:,.3f}")
                table.add_row(_UNIT[name], kind, f"{group} devices", f"{count:,.1f}", *sizes)
    return table


def _rates(plan: Plan) -> Table:
    title = "predicted, all devices together: without overlap – roofline"
    table = Table("", "tokens/s", "MFU", "bound by", title=title)
    for name, rate in plan.rates.items():
        span = f"{rate.slowest:,.0f} – {rate.fastest:,.0f}"
        table.add_row(_LABEL[name], span, f"{rate.slowest_mfu:.1%} – {rate.fastest_mfu:.1%}", plan.seconds[name].bound)
    return table


def _end(plan: Plan) -> Iterable[str]:
    for name, reason in plan.broken.items():
        package = plan.compiler.partition(" ")[0]
        yield f"unknown: {_LABEL[name]}; the compiler failed ({reason}). Another version of {package} may work"
    for name, cost in plan.costs.items():
        if known := [kernel for kernel in cost.kernels if kernel.known]:
            flops = math.fsum(kernel.count * kernel.flops for kernel in known) / plan.units.get(name, 1.0)
            names = ", ".join(sorted({kernel.name for kernel in known}))
            counted = f"{flops / 1e12:.3f} TFLOP of kernels, in closed form and timed at the peaks"
            yield f"in {_UNIT[name]}: {counted} ({names})"
        if unknown := sorted({kernel.name for kernel in cost.kernels if not kernel.known}):
            yield f"not counted in {_UNIT[name]}: FLOPs of the kernels {', '.join(unknown)}"
    if not plan.too_large:
        largest = max(plan.phases.values(), default=math.nan)
        yield f"fits: at most {largest / GIB:.1f} of {plan.topology.memory / GIB:.1f} GiB"
        return
    names = ", ".join(_LABEL[name] for name in plan.too_large)
    yield f"does not fit: {names}. What would help, the largest saving first:"
    for line in plan.advice:
        yield f"  {line}"
