"""What `inspect` reads from: any checkpoint, known to transformers or not, factored or quantised, one matrix at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..axes.protocols import Site
from ..catalogue import Catalogue, from_headers
from ..catalogue.catalogue import natural
from ..errors import Refused, UsageError
from .host import FolderHost, Host, ModuleHost, open_host

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PACKED = re.compile(
    r"^(.*?)(?:\._weight_qdata|\.qweight|\.weight_packed|\.weight)$"
)  # torchao, GPTQ and AWQ, compressed-tensors, bitsandbytes
SCALES = (".weight_scale", ".weight_scale_inv", ".scale_weight", "._weight_scale")


class WeightFolder(FolderHost):
    """A checkpoint of which weights are read. Where transformers cannot say what its modules are, names and shapes do.

    Of a folder that eckart factored, each pair is read as the matrix that it stands for. `remark` says what is unusual.
    """

    remark: str = ""

    def __init__(self, path: str | Path, tokenizer: Any = None, device: str | None = None) -> None:
        super().__init__(path, tokenizer, device)
        self._place = device

    def _catalogue(self) -> Catalogue:
        quantised = self.reader.config.get("quantization_config")
        if isinstance(quantised, dict) and quantised.get("quant_method") == "eckart":
            self.remark = "The layers that eckart factored are measured as the products of their pairs."
            return _products(from_headers(self.reader), self.reader)
        if quantised:
            return _with_packed(from_headers(self.reader), self.reader)
        try:
            found = super()._catalogue()
        except (Refused, UsageError) as error:
            self.remark = f"Matrices were found by their names alone: {str(error).splitlines()[0]}"
            return _with_packed(from_headers(self.reader), self.reader)
        if not self.reader.config.get("architectures") and not self.reader.config.get("model_type"):
            self.remark = "Matrices were found by their names alone: config.json does not say what the model is."
            return _with_packed(found, self.reader)
        return found

    def read(self, site: Site) -> Tensor:
        """W (out, in); 8-bit floats, which no factorisation takes, as float32."""
        if site.view == "product":
            up, down = (self.reader.read(k).float() for k in site.tensors)
            return self._put(up @ down)
        found = super().read(site)
        return self._put(found.float() if found.dtype.itemsize == 1 and found.is_floating_point() else found)

    def _put(self, weight: Tensor) -> Tensor:
        return weight if self._place is None else weight.to(self._place)

    def close(self) -> None:
        """Let the live model go: weights are read from the file."""
        if "_live" in vars(self):
            del self._live


def open_weights(model: Any, tokenizer: Any = None, device: str | None = None, example: Any = None) -> WeightFolder | ModuleHost:
    """A host whose matrices can be read one by one.

    Raises:
        UsageError: neither a folder, nor a Hub id, nor a module.
        Refused: a module in memory whose weights are no plain tensors: quantised, sharded, or without values.
    """
    if hasattr(model, "state_dict"):
        for key, tensor in model.state_dict().items():
            if hasattr(tensor, "is_meta") and (tensor.is_meta or type(tensor).__name__ not in ("Tensor", "Parameter")):
                kind = "has no values (meta device)" if tensor.is_meta else f"is a {type(tensor).__name__}, not a plain tensor"
                raise Refused(f"{key} {kind}. Inspect the checkpoint that the model was made from: eckart inspect ORIGINAL")
        return open_host(model, tokenizer, device, example)  # type: ignore[return-value]
    if isinstance(model, str) or hasattr(model, "__fspath__"):
        return WeightFolder(model, tokenizer, device)
    raise UsageError(f"model: expected a folder, a Hub id, or a torch module, found {type(model).__name__}.")


def unreadable(host: Host, site: Site) -> str:
    """Why a matrix has no spectrum, as far as the file's header says; empty when it may have one."""
    if 0 in site.shape:
        return f"the matrix is empty ({site.shape[0]} x {site.shape[1]})"
    kinds = {host.reader.info(k).dtype for k in site.tensors}
    other = sorted(k for k in kinds if "F" not in k)
    if other:
        method = host.reader.config.get("quantization_config")
        by = f" by {method.get('quant_method', 'some quantiser')}" if isinstance(method, Mapping) else ""
        return f"stored as {', '.join(other)}{by}, not as real numbers"
    base = site.tensors[0].removesuffix(".weight")
    scales = [base + s for s in SCALES if base + s in host.reader]
    if scales and any(k.startswith("F8") for k in kinds):
        return f"stored as {', '.join(sorted(kinds))} with scales in {scales[0]}; the bare values are not the weight"
    return ""


def _products(found: Catalogue, reader: Any) -> Catalogue:
    """Pairs `x.up.weight`, `x.down.weight` with their guard `x.weight` of shape (1,) as one matrix `x`."""
    sites: list[Site] = []
    for site in found.sites:
        base, _, part = site.name.rpartition(".")
        guard = f"{base}.weight"
        pair = tuple(f"{base}.{p}.weight" for p in ("up", "down"))
        if part not in ("up", "down") or guard not in reader or any(k not in reader for k in pair):
            sites.append(site)
        elif part == "down":
            (m, _), (_, n) = (reader.info(k).shape for k in pair)
            sites.append(replace(site, name=base, shape=(m, n), tensors=pair, view="product", bias=None, reads=base))
    used = {k for s in sites for k in s.tensors}
    return replace(found, sites=tuple(sites), others=tuple(k for k in found.others if k not in used))


def _with_packed(found: Catalogue, reader: Any) -> Catalogue:
    """And the weights that are stored as integers, so that each of them gets a record that says so."""
    known = {s.name for s in found.sites}
    sites = list(found.sites)
    for key in found.others:
        info = reader.info(key)
        match = PACKED.match(key)
        if match and len(info.shape) == 2 and "F" not in info.dtype and match[1] not in known:
            block = next((i for i, b in enumerate(found.blocks) if match[1].startswith(b + ".")), -1)
            sites.append(Site(match[1], tuple(info.shape), (key,), reads=match[1], block=block, dtype=info.dtype))
    return found if len(sites) == len(known) else replace(found, sites=tuple(sorted(sites, key=lambda s: natural(s.name))))


def choose_sites(host: Host, only: Sequence[str], kinds: Sequence[str]) -> list[Site]:
    """The matrices of a run.

    Args:
        host: the model.
        only: regular expressions of which one must be found in the name; none takes all.
        kinds: of "linear", "embedding", "conv", "other".

    Raises:
        UsageError: nothing is left, an unknown kind, or a pattern that is no regular expression.
    """
    known = ("linear", "embedding", "conv", "other")
    wrong = [k for k in kinds if k not in known]
    if wrong or not kinds:
        raise UsageError(f"kinds: expected some of {', '.join(known)}, found {wrong[0] if wrong else 'none'!r}.")
    try:
        patterns = [re.compile(p) for p in only]
    except re.error as error:
        raise UsageError(f"only: {error.pattern!r} is no regular expression: {error}.") from error
    named = [s for s in host.catalogue.sites if not patterns or any(p.search(s.name) for p in patterns)]
    sites = [s for s in named if s.kind in kinds]
    if not sites:
        rest = sorted({s.kind for s in named} - set(kinds))
        which = f" whose name matches {' or '.join(only)}" if only else ""
        some = ", ".join(s.name for s in [s for s in host.catalogue.sites if s.kind in kinds][:3])
        hint = f" It has {some} ..." if some else ""
        hint = f" There are some of the kind {', '.join(rest)}: add --kinds {','.join([*kinds, *rest])}." if rest else hint
        raise UsageError(f"{host.name}: no matrix of the kind {', '.join(kinds)}{which}.{hint}")
    return sites


def pair_up(sites: Sequence[Site], other: Host) -> dict[str, Site]:
    """For each matrix the one of the same name in another checkpoint; one of the two may have a first part that the other lacks.

    Raises:
        UsageError: not one name is in both.
    """
    theirs = {s.name: s for s in other.catalogue.sites}
    shorter = {s.name.partition(".")[2]: s for s in other.catalogue.sites}
    found: dict[str, Site] = {}
    for site in sites:
        match = theirs.get(site.name) or shorter.get(site.name) or theirs.get(site.name.partition(".")[2])
        if match is not None:
            found[site.name] = match
    if not found:
        adapter = other.path is not None and (other.path / "adapter_config.json").is_file()
        hint = " It is a PEFT adapter: merge it into its base model, save that, and compare with it." if adapter else ""
        few = ", ".join(list(theirs)[:3])
        raise UsageError(f"other: {other.name} has no matrix of the same name (it has {few or 'none'}).{hint}")
    return found
