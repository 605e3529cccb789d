"""Containers in a cluster profile: which image jobs run in, and what they see of the host."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ..redaction import holds_a_secret
from .fields import Model, matching, shown

_UNSAFE = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\'\"`$"  # in a character class: what no shell or path needs
_path = matching(rf"/[^{_UNSAFE},:]*", "an absolute path without quotes, backslash, $ , or :")
_image = matching(
    rf"[A-Za-z0-9_/.][^{_UNSAFE},]*",
    "an absolute path or an address such as docker://NAME:TAG, without quotes, backslash, comma or $",
)
_option = matching(
    r"--?[A-Za-z][^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*", "an option that begins with - or --, on one line"
)

Option = Annotated[str, Field(max_length=1024), AfterValidator(_option)]
APPTAINER = ("apptainer", "singularity")
HIDES_SLURM = ("--cleanenv", "--containall", "-e", "-C")
"""Options of Apptainer after which the ranks no longer know who they are: Slurm tells them by environment variables."""


def _bind(text: str) -> str:
    parts = text.split(":")
    if not 1 <= len(parts) <= 3 or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise ValueError(f"should be SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, not {shown(text)}")
    for part in parts[:2]:
        _path(part)
    return text


class Container(Model):
    """How a job's processes get into a container; ``none`` is as good as no container at all.

    The run directory and the datasets are bound by themselves, under their own paths.
    """

    runtime: Literal["apptainer", "singularity", "pyxis", "none"]
    """What starts it; ``none`` is as good as no container at all."""
    image: Annotated[str, Field(max_length=1024), AfterValidator(_image)] | None = None
    """An absolute path, or an address such as ``docker://NAME:TAG``."""
    binds: tuple[Annotated[str, Field(max_length=2048), AfterValidator(_bind)], ...] = ()
    """Folders it sees beside the run and the datasets: ``SOURCE``, ``SOURCE:TARGET`` or ``SOURCE:TARGET:ro``."""
    args: tuple[Option, ...] = ()
    """Options of ``apptainer exec``, or of pyxis (``--container-...``)."""

    @model_validator(mode="after")
    def _fits_the_runtime(self) -> Container:
        if self.runtime == "none":
            if self.image is not None or self.binds or self.args:
                raise ValueError("runtime none takes no image, binds or args: name apptainer, singularity or pyxis")
            return self
        if any(holds_a_secret(words) for words in (self.image or "", *self.args)):
            raise ValueError("image and args should not hold keys, tokens or passwords: export them where you submit")
        if self.image is None:
            raise ValueError(f"image is missing: runtime {self.runtime} needs one, such as image: /shared/hpc-cifar.sif")
        if self.runtime == "pyxis":
            wrong = [option for option in self.args if not option.startswith("--container-")]
            if wrong:
                raise ValueError(f"args should hold options of pyxis, --container-..., not {shown(wrong[0])}; see srun_args")
            return self
        if not self.image.startswith("/") and "://" not in self.image:
            raise ValueError(f"image should be an absolute path or an address such as docker://NAME, not {shown(self.image)}")
        wrong = [option for option in self.args if option.partition("=")[0] in HIDES_SLURM]
        if wrong:
            raise ValueError(f"args should not hold {wrong[0]}: it hides from the ranks what Slurm tells them")
        return self
