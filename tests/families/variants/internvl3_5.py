"""InternVL 3.5: InternVL's frame around Qwen3."""

from functools import partial

from tests.families.variant import Variant

from . import internvl

VARIANT = Variant(
    partial(internvl.make, kind="qwen3"), internvl.VARIANT.template, internvl.VARIANT.named, internvl.VARIANT.marks,
    eos=internvl.VARIANT.eos,
)  # fmt: skip
