"""Special tokens that a recipe lets data say, such as those around boxes, are tokens in texts, and stay in answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from qmixlora.data import IGNORED, Collator
from qmixlora.data.checking.special_tokens import learned_as_letters
from qmixlora.errors import UserError

from ..chats import CHATS, processor_of

BOX = "<soft>(1,2)<eos>(3,4)<soft>"
ROW: Any = {
    "turns": [{"role": "user", "text": "where is <soft>the cat<soft> ?"}, {"role": "assistant", "text": BOX}],
    "images": [],
    "task": "t",
}


def collator_of(*tokens: str) -> Collator:
    return Collator(processor_of(CHATS["qwen3_vl"]), 1000, special_tokens=tokens)


def labels_of(collator: Collator) -> list[int]:
    labels_S = collator([ROW])["labels"][0]
    return [int(token) for token in labels_S[labels_S != IGNORED]]


def test_named_tokens_are_learned_and_asked_as_tokens_and_others_as_letters() -> None:
    collator = collator_of("<soft>")
    tokenizer = collator.processor.tokenizer
    soft, eos = tokenizer.convert_tokens_to_ids(["<soft>", "<eos>"])
    learned = labels_of(collator)
    assert learned[0] == soft and learned.count(soft) == 2 and eos not in learned
    assert collator.tokens(ROW["turns"][:1], prompt=True).count(soft) == 2
    assert {soft, eos}.isdisjoint(collator_of()([ROW])["input_ids"][0].tolist())


def test_named_tokens_stay_in_answers_and_others_are_left_out() -> None:
    plain, collator = collator_of(), collator_of("<soft>")
    ids = [*collator.processor.tokenizer(BOX, add_special_tokens=False)["input_ids"], collator.end_id]
    assert collator.decode(torch.tensor([ids])) == ["<soft>(1,2)(3,4)<soft>"]
    assert plain.decode(torch.tensor([ids])) == ["(1,2)(3,4)"]
    assert collator.decode(torch.tensor([labels_of(collator)])) == [BOX]


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("<|im_end|>", "'<\\|im_end\\|>' is what the model's chat template"),
        ("<start>", "'<start>' is what the model's chat template"),  # around an image
        ("<|endoftext|>", "'<\\|endoftext\\|>' is what"),  # padding
        ("<sofd>", "(?s)no special token '<sofd>'.*Did you mean '<soft>'"),
        ("cat", "no special token 'cat'"),
    ],
)
def test_tokens_that_data_may_not_say_are_refused(token: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        collator_of(token)([ROW])
    assert refused.value.where == "data.special_tokens"


def test_answers_with_special_tokens_that_are_learned_as_letters_are_told() -> None:
    answers = [Counter({BOX: 3, "<soft>a": 1, "red": 5}), Counter({"<image><|im_end|> is quoted": 2})]
    told = learned_as_letters(answers, collator_of().template)
    assert told is not None and told.startswith("4 answers hold special tokens of the model (<soft>, <eos>), which")
    assert learned_as_letters(answers, collator_of("<soft>", "<eos>").template) is None
    assert learned_as_letters(answers[1:], collator_of().template) is None
