"""PP-Chart2Table: GOT-OCR2's model for charts; the chat template writes the image tokens."""

from transformers import PPChart2TableImageProcessor, PPChart2TableProcessor

from tests.families.variant import Made, Variant, chatml

from . import got_ocr2


def make(tokens) -> Made:
    images = PPChart2TableImageProcessor(size={"height": 256, "width": 256})
    return got_ocr2.config(tokens, "pp_chart2table"), PPChart2TableProcessor(images, tokens)


VARIANT = Variant(
    make, chatml(f"<img>{'<imgpad>' * 256}</img>\n"), marks=got_ocr2.VARIANT.marks, eos=got_ocr2.VARIANT.eos
)
