"""What a chat template does to conversations is found out and told: ends, thoughts, beginnings, what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from qmixlora.data import IGNORED, IMAGE, Collator, one_answer_each, rendering_of, rendering_problem
from qmixlora.data.reading.store import FEATURES
from qmixlora.data.rendering.letters import START
from qmixlora.errors import UserError

from ..chats import CHATML, CHATS, GEMMA, LLAVA, THINKS, Chat, processor_of

PLAIN = CHATML.replace("IMAGE", "<start><image><end>")
CUTS = PLAIN.replace("{{ part.text }}", "{{ part.text.split('|')[0] }}")
ONCE = PLAIN + "{{ raise_exception('one question only') if messages | length > 2 }}"


def collator_of(template: str, tokens: str = "bytes", family: str = "qwen3_vl", **arguments: Any) -> Collator:
    return Collator(processor_of(Chat(family, tokens, template, "")), 1000, arguments)


def row_of(*texts: str, **more: Any) -> Any:
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "text": text} for index, text in enumerate(texts)]
    lists: dict[str, Any] = {"images": [], "tasks": [], "references": [], "learned": []}
    return {"turns": turns, "task": "t", "origin": "here", **lists, **more}


def notes(template: str, **arguments: Any) -> str:
    return " ".join(rendering_of(collator_of(template, **arguments).template).notes())


@pytest.mark.parametrize("family", sorted(CHATS))
def test_the_token_that_ends_an_answer_is_told(family: str) -> None:
    chat = CHATS[family]
    [note] = rendering_of(Collator(processor_of(chat), 1000).template).notes()
    assert note.startswith(f"Every answer ends in {chat.end!r}") and ("is added" in note) == (family == "llava")


def test_an_end_that_is_no_token_of_the_tokenizer_ends_nothing() -> None:
    collator = collator_of(PLAIN.replace("<|im_end|>", "<|the_end|>"))
    assert collator.template.end_token == collator.processor.tokenizer.eos_token
    assert not rendering_of(collator.template).writes_end


def test_a_turn_ends_with_an_ordinary_added_token_too() -> None:
    """One that is not declared special, as in some tokenizers that were extended by hand."""
    collator = collator_of(PLAIN.replace("<|im_end|>", "</think>"))
    assert collator.template.end_token == "</think>"
    assert "</think>" in collator.template.letters.control


def test_without_any_end_training_is_refused() -> None:
    collator = collator_of(LLAVA, family="llava", tokens="llama")
    tokenizer = collator.processor.tokenizer
    eos, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        with pytest.raises(UserError, match="Nothing ends an answer"):
            collator([row_of("what ?", "red")])
    finally:
        tokenizer.eos_token = eos


def test_a_prompt_that_training_never_saw_is_told() -> None:
    forgetful = PLAIN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert "begins where nothing was learned" in notes(forgetful)
    assert "begins where nothing was learned" not in notes(PLAIN)


def test_an_argument_of_the_template_changes_the_prompt() -> None:
    collator = collator_of(THINKS.template, enable_thinking=False)
    prompt = collator.processor.tokenizer.decode(collator.prompts([row_of("what ?", "red")])["input_ids"][0])
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert rendering_of(collator.template).is_true_beginning


def test_an_argument_that_the_template_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="knows nothing of 'enable_thinkin'"):
        collator_of(THINKS.template, enable_thinkin=False).prompts([row_of("what ?", "red")])


def test_thoughts_that_a_template_leaves_out_make_a_sample_of_every_answer() -> None:
    collator = collator_of(THINKS.template)
    images = [{"path": f"{name}.png", "bytes": None} for name in "ab"]
    asked = row_of(f"{IMAGE}what ?", "<think>\nhm\n</think>\n\nred", f"{IMAGE}why ?", "so", images=images)
    rows = one_answer_each(Dataset.from_list([asked, row_of("who ?", "me")], features=FEATURES), collator.template)
    assert [row["turns"][-1]["text"] for row in rows] == ["<think>\nhm\n</think>\n\nred", "so", "me"]
    assert [len(row["images"]) for row in rows] == [1, 2, 0] and rows.features == FEATURES
    assert "becomes a sample of its own" in notes(THINKS.template)


def test_a_sample_of_every_answer_has_its_task() -> None:
    asked = {**row_of("what ?", "<think>\nhm\n</think>\n\nred", "why ?", "so"), "task": "b", "tasks": ["a", "b"]}
    rows = one_answer_each(Dataset.from_list([asked], features=FEATURES), collator_of(THINKS.template).template)
    assert rows["task"][:] == ["a", "b"] and rows["tasks"][:] == [[], []]


def test_no_sample_is_made_of_an_answer_that_is_not_learned() -> None:
    thought = "<think>x</think>"
    turns = ("a", "b", "c", f"{thought}d", "e", "f", "g", "h")
    collator = collator_of(LEAVES_OUT)
    for learned, ends in (
        ([False, True, False, True], [4, 8]),
        ([True, False, False, True], [4, 8]),
        ([False, False, True, True], [6, 8]),
    ):
        asked = {**row_of(*turns), "learned": learned}
        rows = list(one_answer_each(Dataset.from_list([asked], features=FEATURES), collator.template))
        assert [len(row["turns"]) for row in rows] == ends, learned
        labels = collator(rows)["labels"]
        taught = [collator.processor.tokenizer.decode(own_S[own_S != IGNORED]) for own_S in labels]
        expected = [answer for answer, is_learned in zip(turns[1::2], learned, strict=True) if is_learned]
        assert [text.removesuffix("<|im_end|>").strip() for text in taught] == expected


def test_a_sample_of_one_of_several_answers_is_one_segment() -> None:
    collator = collator_of(THINKS.template)
    row = row_of("what ?", "<think>\nhm\n</think>\n\nred", "why ?", "so")
    batch, (_, routing) = collator([row]), collator.routed_prompts([row])
    assert not batch["segments"].any() and not routing["segments"].any() and routing["routing_mask"].all()


def test_a_template_that_only_leaves_thoughts_out_parts_only_conversations_with_thoughts() -> None:
    leaves_out = PLAIN.replace("{{ part.text }}", "{{ part.text.split('</think>')[-1] }}")
    collator = collator_of(leaves_out)
    plain, thinking = row_of("a", "b", "c", "d"), row_of("a", "<think>x</think>b", "c", "d")
    rows = one_answer_each(Dataset.from_list([plain, thinking], features=FEATURES), collator.template)
    assert [len(row["turns"]) for row in rows] == [4, 2, 4]
    assert "behind one with thoughts" in notes(leaves_out)


LEAVES_OUT = PLAIN.replace(
    "{{ part.text }}", "{{ part.text if loop_last else part.text.split('</think>')[-1] }}"
).replace("{% for part", "{% set loop_last = loop.last %}{% for part")


def test_the_answer_to_come_does_not_decide_how_its_question_is_routed() -> None:
    """An earlier answer without thoughts stands as it was: a segment of its own, whatever the last one is."""
    collator = collator_of(LEAVES_OUT)
    rows = [row_of("a", "b", "c", last) for last in ("<think>x</think>d", "d", "")]
    assert not collator.template.keeps_thoughts and collator.template.is_append_only
    taught = collator(rows[:1])
    assert taught["segments"].max() == 1 and len(collator.template.conversation(rows[0]["turns"]).split(START)) == 3
    for row in rows:
        inputs, routing = collator.routed_prompts([row])
        width = inputs["input_ids"].shape[1]
        assert torch.equal(inputs["input_ids"][0], taught["input_ids"][0, :width])
        assert torch.equal(routing["segments"][0], taught["segments"][0, :width])


def test_answers_up_to_the_first_with_thoughts_are_one_sample_and_each_behind_it_one_more() -> None:
    turns = ("a", "b", "c", "<think>x</think>d", "e", "f")
    asked = {**row_of(*turns), "task": "z", "tasks": ["x", "y", "z"]}
    rows = one_answer_each(Dataset.from_list([asked], features=FEATURES), collator_of(LEAVES_OUT).template)
    assert [len(row["turns"]) for row in rows] == [4, 6]
    assert rows["task"][:] == ["y", "z"] and rows["tasks"][:] == [["x", "y"], []]


# the system's words: in the last question alone, and only where nothing comes behind it (as Pixtral's template)
LATE = (
    "{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last and message.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content[0].text }}"
    "\n{% endif %}{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_is_trained_begins_as_it_is_asked_for_where_the_template_writes_more_into_a_last_question() -> None:
    collator = collator_of(LATE)
    row = {**row_of("a", "b", "c", "d")}
    row["turns"] = [{"role": "system", "text": "s"}, *row["turns"]]
    rows = list(one_answer_each(Dataset.from_list([row], features=FEATURES), collator.template))
    assert [len(own["turns"]) for own in rows] == [3, 5]
    for own in rows:
        text, prompt = collator.template.conversation(own["turns"]), collator.template.prompt(own["turns"])
        assert text.startswith(prompt + START) and "s\n" in prompt
        assert text.count("<|im_start|>") == len(own["turns"]) - 1 and text.count(f"\n{own['turns'][-2]['text']}") == 1
    plain = Dataset.from_list([row_of("a", "b", "c", "d")], features=FEATURES)
    assert len(one_answer_each(plain, collator.template)) == 1


def test_rows_are_left_alone_where_all_answers_are_taught() -> None:
    rows = Dataset.from_list([row_of("a", "b", "c", "d")], features=FEATURES)
    assert one_answer_each(rows, collator_of(PLAIN).template) is rows


@pytest.mark.parametrize(
    ("template", "row", "problem"),
    [
        (PLAIN, row_of("a", "b"), None),
        (CUTS, row_of("a", "b|c"), "as it stands"),
        (CUTS, row_of("a", "b|", "c", "d"), "every answer"),
        (ONCE, row_of("a", "b"), None),
        (ONCE, row_of("a", "b", "c", "d"), "one question only"),
    ],
)
def test_a_row_that_the_template_changes_has_a_problem(template: str, row: Any, problem: str | None) -> None:
    told = rendering_problem(collator_of(template), row)
    assert told is None if problem is None else problem in str(told)


SILENT = PLAIN.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
FIRST = PLAIN.replace("{% for part in message.content %}", "{% for part in message.content[:2] %}")
IN_LAST = PLAIN.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
).replace(
    "{% for part",
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content[0].text }}\n{% endif %}{% for part",
)
MIDST = f"{IMAGE}Is {IMAGE} darker than <|im_end|> ?"


@pytest.mark.parametrize(
    ("template", "texts", "problem"),
    [
        (PLAIN, (MIDST, "no", f" and {IMAGE}", "yes"), None),
        (GEMMA.replace("IMAGE", "<image>"), (MIDST, "no", f" and {IMAGE}", "yes"), None),
        (SILENT, ("Is it red ?", "no"), "leaves out the system's words"),
        (IN_LAST, ("Is it red ?", "no", "Why ?", "so"), None),
        (FIRST, (MIDST, "no"), "leaves out words of a question"),
        (LLAVA, (f"{IMAGE}{IMAGE}\nWhich is red ?", "no", f"{IMAGE}and this ?", "yes"), None),
        (LLAVA, (f"What is in {IMAGE} ?", "no"), "moves an image"),
        (LLAVA, (f"What is this ? {IMAGE}", "no", "Why ?", "so"), "moves an image"),
    ],
)
def test_words_and_images_that_a_template_leaves_out_or_moves_are_a_problem(
    template: str, texts: tuple[str, ...], problem: str | None
) -> None:
    row = row_of(*texts)
    row["turns"] = [{"role": "system", "text": " Be terse. "}, *row["turns"]]
    told = rendering_problem(collator_of(template), row)
    assert told is None if problem is None else problem in str(told)


def test_an_answer_that_begins_within_the_prompt_is_not_told_to_be_rewritten() -> None:
    """A template for thoughts writes `<think>` before an answer that begins with it."""
    collator = collator_of(THINKS.template)
    assert rendering_problem(collator, row_of("what ?", "<think>\nhm\n</think>\n\nred")) is None
    shortens = collator_of(THINKS.template.replace("+ said", "+ said[:2]"))
    told = rendering_problem(shortens, row_of("what ?", "<think>\nhm\n</think>\n\nred"))
    assert told == "The chat template does not write the last answer as it stands in the data."


def test_a_template_for_strings_is_refused() -> None:
    """It would write Python's own notation of the parts into every prompt."""
    strings = CHATML.partition("{% for part")[0] + "{{ message.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(UserError, match="content is a list"):
        collator_of(strings)([row_of("a", "b")])


def test_a_last_question_and_answer_that_are_both_rewritten_are_refused() -> None:
    """Where the answer begins cannot be told."""
    rewrites = LATE.replace("{{ part.text }}", "{{ part.text.split('</think>')[-1] }}")
    row = row_of("a", "<think>x</think>b")
    row["turns"] = [{"role": "system", "text": "s"}, *row["turns"]]
    with pytest.raises(UserError, match="rewrites both"):
        collator_of(rewrites)([row])
