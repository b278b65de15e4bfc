"""A kind of device and the links between devices, as the numbers from which times are predicted.

A preset of `conf/gpu` has the figures of one kind, each with its source. `with_rates` replaces rates of a preset by
those that `benchmarks/gpu.py stages=calibrate` measured on a machine.

Units are bytes, bytes/s, FLOP/s and seconds.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from common.errors import ConfigError, expect, require
from common.files import read_file
from common.strict import from_dict
from common.text import one_line, parse_json_object, printable, shorten

PRESETS = Path(__file__).resolve().parents[2] / "conf" / "gpu"
MAX_FILE = 2**24
"""Bytes of the largest calibration file that is read."""
POSITIVE = (
    "memory", "peak", "matmul", "grouped_matmul", "attention_forward", "attention_backward", "wide_matmul", "bandwidth",
    "launch_s", "link", "network",
)  # fmt: skip
NOT_NEGATIVE = ("reserved", "link_latency_s", "network_latency_s")
CALIBRATE = "benchmarks/gpu.py stages=calibrate"
SAME_NAME = (
    "matmul", "attention_forward", "attention_backward", "wide_matmul", "link", "network", "link_latency_s",
    "network_latency_s",
)  # fmt: skip
"""The rates of a calibration file that are fields of `Hardware` with the same name."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of device, and how devices of this kind are connected.

    Every figure but `price` has an entry in `sources`.
    """

    name: str
    """The device, and the form in which it is sold where that matters."""
    memory: float
    """Bytes of memory of one device, as the driver reports them to torch."""
    reserved: float
    """Bytes of `memory` that the context, the libraries and the buffers of NCCL take."""
    precision: Literal["bf16", "fp32"]
    """What `train.precision=auto` means on this device: bf16 if it multiplies bf16. `peak` and the rates of matmuls and
    attention are those of this type."""
    capability: int | None
    """Major number of the CUDA compute capability, by which kernels are chosen; None: not a GPU."""
    peak: float
    """FLOP/s of the vendor's data sheet, for matrices without sparsity. MFU is relative to it."""
    matmul: float
    """FLOP/s of large matmuls."""
    grouped_matmul: float
    """FLOP/s of large grouped matmuls, in the mean over the forward and the backward pass."""
    attention_forward: float
    """FLOP/s of causal attention over whole rows, with 4·C FLOPs for each pair of positions that attend."""
    attention_backward: float
    """FLOP/s of its backward pass, with 10·C FLOPs for each pair."""
    wide_matmul: float
    """FLOP/s of large matmuls in fp32."""
    bandwidth: float
    """Bytes/s that a kernel reads and writes in the device's memory, if they do not fit into the cache."""
    launch_s: float
    """Seconds of the smallest kernel. No operator takes less time."""
    gpus_per_node: int
    """Devices of one node. On CPUs: ranks of one host."""
    link: float
    """Bytes/s that each device of a node sends to the others in a collective of large tensors."""
    network: float
    """The same between nodes, if all devices of a node send at once."""
    link_latency_s: float
    """Seconds that a collective inside a node takes, however little it sends."""
    network_latency_s: float
    """The same for a collective between nodes."""
    price: float | None
    """US dollars for one device and hour; None: unknown."""
    sources: dict[str, str] = dataclasses.field(hash=False)
    """Field -> where its figure comes from: a data sheet, a measurement, or an assumption and its reason."""

    def __post_init__(self) -> None:
        for field in (*POSITIVE, *NOT_NEGATIVE):
            value = getattr(self, field)
            zero = field in NOT_NEGATIVE
            expect(value >= 0 if zero else value > 0, field, value, f"a number {'>=' if zero else '>'} 0")
        expect(bool(self.name), "name", repr(self.name), "a name")
        expect(self.reserved < self.memory, "reserved", self.reserved, f"less than memory={self.memory}")
        capability = self.capability
        expect(capability is None or capability >= 1, "capability", capability, "an integer >= 1 or null")
        expect(self.gpus_per_node >= 1, "gpus_per_node", self.gpus_per_node, "an integer >= 1")
        expect(self.price is None or self.price > 0, "price", self.price, "a number > 0 or null")
        figures = {field.name for field in dataclasses.fields(self)} - {"name", "price", "sources"}
        for wrong in sorted(figures ^ (self.sources.keys() - {"price"})):
            found = self.sources.get(wrong, "")
            expect(False, f"sources.{wrong}", found, "a source for each figure" if wrong in figures else "a figure")

    @property
    def usable(self) -> float:
        """Bytes of memory that tensors can use."""
        return self.memory - self.reserved


def read_preset(name: str) -> Hardware:
    """Return the preset `conf/gpu/<name>.yaml`.

    Raises:
        ConfigError: there is no such preset.
    """
    import yaml  # loads slowly

    path = PRESETS / f"{name}.yaml"
    names = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
    require(name in names, ConfigError, f"gpu={printable(name)}: expected one of {', '.join(names)}")
    return from_dict(Hardware, yaml.safe_load(path.read_text(encoding="utf-8")), "gpu")


def preset_of_device(name: str, capability: int, memory: int) -> tuple[str, str | None]:
    """Return the name of the preset of a GPU, or of the one that is most like it.

    Args:
        name: as torch reports it, such as `NVIDIA A100-SXM4-80GB`.
        capability: major number of its compute capability.
        memory: bytes.

    Returns:
        The preset, and None or a sentence which says that it is that of another device.
    """
    presets = {path.stem: read_preset(path.stem) for path in sorted(PRESETS.glob("*.yaml"))}
    gpus = {stem: preset for stem, preset in presets.items() if preset.capability is not None}
    squeezed = "".join(filter(str.isalnum, name.lower()))
    same = [stem for stem in gpus if stem.partition("-")[0] in squeezed]

    def distance(stem: str) -> tuple[int, float]:
        return abs((gpus[stem].capability or 0) - capability), abs(gpus[stem].memory - memory)

    nearest = min(same or gpus, key=distance)
    note = f"no preset for {printable(name)}; the rates are those of {gpus[nearest].name}"
    return nearest, None if same else note


def with_rates(hardware: Hardware, path: Path) -> Hardware:
    """Replace the rates by those of a calibration file.

    What the file does not have stays as it was, for example the links if one device was measured.

    Args:
        path: `hardware.json` in the output directory of `benchmarks/gpu.py stages=calibrate`.

    Raises:
        ConfigError: the file cannot be read, is not such a file, or has a rate that is not a positive number.
    """
    rates, about = _read(path)
    for name, rate in rates.items():
        is_rate = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < math.inf
        require(is_rate, ConfigError, f"calibration={path}: rates.{printable(name)}={rate!r}: expected a number > 0")
    measured = measured_fields(rates)
    require(measured, ConfigError, f"calibration={path}: expected the rates of {CALIBRATE}, found none of them")
    place = shorten(printable(f"{about.get('device')}, {about.get('date')}"), 200)
    sources = {field: f"measured on {place} ({path})" for field in measured}
    return dataclasses.replace(hardware, **measured, sources=hardware.sources | sources)


def measured_fields(rates: Mapping[str, float]) -> dict[str, Any]:
    """Return the fields of `Hardware` that the rates of a calibration file give.

    >>> measured_fields({"grouped_matmul_forward": 600.0, "grouped_matmul_backward": 300.0, "launch": 2e5})
    {'grouped_matmul': 360.0, 'launch_s': 5e-06}
    """
    fields: dict[str, Any] = {name: rates[name] for name in SAME_NAME if name in rates}
    if "grouped_matmul_forward" in rates and "grouped_matmul_backward" in rates:
        # The backward pass has twice as many FLOPs.
        fields["grouped_matmul"] = 3 / (1 / rates["grouped_matmul_forward"] + 2 / rates["grouped_matmul_backward"])
    if "copy" in rates:
        fields["bandwidth"] = rates["copy"]
    if "launch" in rates:
        fields["launch_s"] = 1 / rates["launch"]
    return fields


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rates of a calibration file and what it says about the machine. Raises ConfigError."""
    start = f"calibration={path}: expected the hardware.json of {CALIBRATE}"
    try:
        content = parse_json_object(read_file(path, MAX_FILE))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(str(error))
        raise ConfigError(f"{start} ({reason})") from error
    rates, about = content.get("rates"), content.get("about")
    require(isinstance(rates, dict) and isinstance(about, dict), ConfigError, f"{start}, found no `rates` and `about`")
    return rates, about  # type: ignore[return-value]
