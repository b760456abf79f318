"""What stands for an image is no instruction: its tokens, and breaks between them."""

from __future__ import annotations

import pytest
import torch

from qmixlora.mixlora.inputs import image_mask, routing_masks

IMAGE, MARK, BREAK, WORD = 9, 8, 1, 2


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([WORD, MARK, IMAGE, BREAK, MARK, IMAGE, BREAK, WORD], [0, 1, 1, 1, 1, 1, 0, 0]),
        ([BREAK, IMAGE, BREAK, BREAK, IMAGE, BREAK], [0, 1, 1, 1, 1, 0]),
        ([IMAGE, BREAK, WORD, BREAK, IMAGE, WORD], [1, 0, 0, 0, 1, 0]),
        ([WORD, BREAK, WORD, BREAK, WORD, WORD], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_breaks_between_image_tokens_belong_to_the_image(ids: list[int], expected: list[int]) -> None:
    assert image_mask(torch.tensor([ids]), [IMAGE, MARK], [BREAK])[0].int().tolist() == expected


def test_a_prompt_without_words_is_routed_on_as_a_whole() -> None:
    ids_BS = torch.tensor([[IMAGE, BREAK, IMAGE], [WORD, IMAGE, IMAGE]])
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    instruction_BS = routing_masks(inputs, [IMAGE], image_breaks=[BREAK])[1]
    assert instruction_BS is not None and instruction_BS.tolist() == [[True] * 3, [True, False, False]]
