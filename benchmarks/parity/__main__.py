"""Whether our encoders and operators give the numbers of the published programs.

    python -m benchmarks.parity DIR
    python -m benchmarks.parity DIR --cases A0 C       only those whose names begin so

DIR holds one safetensors file a case beside an index.json: inputs, weights, and what the published program makes of
them in fp64. Each case is computed in fp64 and in fp32; a line each gives the largest errors, over what is allowed.
The exit status is 0 only if there is a case, all are of known models, and none is off.

    error     |ours - theirs| / (1 + max |theirs|), the largest of any tensor
    allowed   fp64: outputs 1e-9, gradients 1e-8
              fp32: gradients 1e-4, outputs of models 1e-5; of operators ten times the noise of the published program
                    and at least 8 roundings, or 1e-5 where the case tells no noise
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.parity import mamba, operators, ssd_family
from benchmarks.parity.case import Case, Computed

MODELS: dict[str, Callable[[Case, torch.dtype], Computed]] = {
    "TiM4Rec": ssd_family.tim4rec,
    "SSD4Rec": ssd_family.ssd4rec,
    "Mamba4Rec": mamba.mamba4rec,
    "RecMamba": mamba.recmamba,
    "op:ssd": operators.ssd,
    "op:selective_scan": operators.selective,
    "op:causal_conv": operators.conv,
    "op:gated_rmsnorm": operators.norm,
}
OUTPUTS = {torch.float64: 1e-9, torch.float32: 1e-5}
GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-4}
NOISES = 10
ROUNDINGS = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Worst:
    """The tensor of a case that is nearest to its bound, or furthest beyond."""

    error: float
    allowed: float
    name: str

    @property
    def share(self) -> float:
        return self.error / self.allowed

    @property
    def holds(self) -> bool:
        return self.share <= 1  # a NaN does not


@dataclass(frozen=True)
class Verdict:
    """What came of a case in a dtype."""

    case: str
    dtype: torch.dtype
    worst: dict[str, Worst] = field(default_factory=dict)
    trouble: str = ""

    @property
    def holds(self) -> bool:
        return not self.trouble and all(worst.holds for worst in self.worst.values())

    def __str__(self) -> str:
        head = f"{'ok  ' if self.holds else 'FAIL'} {self.case:42} {str(self.dtype).removeprefix('torch.'):8}"
        if self.trouble:
            return f"{head} {self.trouble}"
        figures = [f"{what} {worst.error:.1e} of {worst.allowed:.1e}" for what, worst in self.worst.items()]
        off = [f"{worst.name} is off" for worst in self.worst.values() if not worst.holds]
        return "  ".join([head, *figures, *off])


def main(words: list[str] | None = None) -> int:
    """Judge the cases of a folder, print a line each, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of names")
    args = parser.parse_args(words)
    if not (args.folder / "index.json").is_file():
        parser.error(f"the folder must hold an index.json, got {args.folder}; name the folder of the cases")
    entries = [e for e in read_index(args.folder) if e["case"].startswith(tuple(args.cases))]
    verdicts = []
    for entry in entries:
        for dtype in OUTPUTS:
            verdicts.append(judge(args.folder, entry, dtype))
            print(verdicts[-1], flush=True)
    failed = sum(not verdict.holds for verdict in verdicts)
    print(f"{len(entries)} cases, {len(verdicts)} runs, {failed} failed")
    return int(bool(failed) or not verdicts)


def read_index(folder: Path) -> list[dict]:
    """The entries of a folder's index, a case each."""
    return json.loads((folder / "index.json").read_text())


def judge(folder: Path, entry: dict, dtype: torch.dtype) -> Verdict:
    """Compute one case in one dtype."""
    compute = MODELS.get(entry["model"])
    if compute is None:
        return Verdict(entry["case"], dtype, trouble=f"model {entry['model']!r} is none of {', '.join(MODELS)}")
    try:
        case = read_case(folder, entry)
        computed = compute(case, dtype)
        return _verdict(case, dtype, computed)
    except Exception as error:  # whatever a case does, the next one is judged
        return Verdict(entry["case"], dtype, trouble=f"{type(error).__name__}: {error}")


def read_case(folder: Path, entry: dict) -> Case:
    """A case with its tensors, of the file that the index knows."""
    from safetensors.torch import load  # an extra of the tests

    content = (folder / entry["file"]).read_bytes()
    if entry.get("sha256") not in (None, digest := hashlib.sha256(content).hexdigest()):
        raise ValueError(f"{entry['file']} must have the sha256 of the index, got {digest}; fetch the folder again")
    return Case(entry, load(content))


def _verdict(case: Case, dtype: torch.dtype, computed: Computed) -> Verdict:
    if not computed.outputs:
        return Verdict(case.name, dtype, trouble="nothing was compared")
    outputs = [_error(n, ours, theirs, _allowed(case, dtype, n, theirs)) for n, ours, theirs in computed.outputs]
    gradients = [_error(*pair, GRADIENTS[dtype]) for pair in computed.gradients]
    judged = {"outputs": outputs, "gradients": gradients}
    return Verdict(case.name, dtype, {what: _worst(errors) for what, errors in judged.items() if errors})


def _allowed(case: Case, dtype: torch.dtype, name: str, theirs: Tensor) -> float:
    noise = (case.entry.get("fp32_noise") or {}).get(name.split(".", 1)[-1])
    if dtype == torch.float64 or noise is None or not case.entry["model"].startswith("op:"):
        return OUTPUTS[dtype]
    return max(NOISES * noise / (1 + theirs.abs().max().item()), ROUNDINGS)


def _error(name: str, ours: Tensor, theirs: Tensor, allowed: float) -> Worst:
    if ours.shape != theirs.shape:
        raise ValueError(f"{name} must be {tuple(theirs.shape)}, got {tuple(ours.shape)}")
    if not theirs.numel():
        return Worst(0.0, allowed, name)
    off = (ours.detach().double() - theirs.double()).abs().max() / (1 + theirs.double().abs().max())
    return Worst(off.item(), allowed, name)


def _worst(errors: list[Worst]) -> Worst:
    return max(errors, key=lambda worst: math.inf if math.isnan(worst.share) else worst.share)


if __name__ == "__main__":
    sys.exit(main())
