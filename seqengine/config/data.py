"""[data]: what is read."""

from typing import Annotated, Literal

from pydantic import Field

from seqengine.config.values import FilePath, Fraction, Positive, Section, Share


class SyntheticSection(Section):
    """[data.synthetic]: the genome of the demo (seqengine.data.synthetic)."""

    length: Positive = 2_000_000
    """Bases."""
    lag: Positive = 40
    """Distance in bases at which the genome repeats itself."""
    repeat: Share = 0.7
    """Probability that a base is the one `lag` bases before."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Another seed is another genome."""


class DataSection(Section):
    """[data]: what is read."""

    source: Literal["fasta", "synthetic"] = "fasta"
    """A genome of yours, or the synthetic one."""
    fasta: FilePath | None = None
    """FASTA file, plain or gzip or bgzip."""
    bed: FilePath | None = None
    """Intervals with a split: chromosome, start, end, train|valid|test. Without it see `valid_fraction`."""
    bed_join: bool = False
    """Join neighbouring intervals of one split, gap included, so that windows longer than an interval exist."""
    cache: str = "runs/cache"
    """Directory of packed genomes, shared by runs."""
    seq_len: Positive = 1024
    """Tokens in a window."""
    window: Literal["tile", "jitter"] = "tile"
    """tile: windows end to end. jitter: each is moved by up to half a window, anew in every epoch."""
    rc_prob: Share = 0.5
    """Probability that a training window is read as its reverse complement."""
    soft_mask: Literal["upper", "unk"] = "upper"
    """Lower-case bases: upper = as their capitals; unk = as [UNK] (the published behaviour)."""
    valid_fraction: Annotated[Fraction, Field(gt=0.0, lt=1.0)] = 0.05
    """Without a BED: this share of the bases, at the end of the file, is validation."""
    synthetic: SyntheticSection = SyntheticSection()
