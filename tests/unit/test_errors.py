"""Errors have what, where and fix, and never a token or a password in them."""

from __future__ import annotations

import pytest

from qmixlora.errors import CheckError, UserError, some, without_secrets

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"401 for {TOKEN}.", "401 for ***."),
        ("https://me:secret@host.org/data.json", "https://***@host.org/data.json"),
        (f"https://{TOKEN}@huggingface.co/x", "https://***@huggingface.co/x"),
        ("https://host/a.png?size=1&access_token=abc123&x=2", "https://host/a.png?size=1&access_token=***&x=2"),
        ("s3://b/a?X-Amz-Signature=0f0f&X-Amz-Date=1", "s3://b/a?X-Amz-Signature=***&X-Amz-Date=1"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
    ],
)
def test_tokens_and_passwords_are_taken_out(text: str, clean: str) -> None:
    assert without_secrets(text) == clean and without_secrets(clean) == clean


@pytest.mark.parametrize(
    "text", ["hf_hub", "a@b.org", "user/model@main", "https://host/a?key2=1", "data/hf_images/a.png", "C:/a?b"]
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("kind", [UserError, CheckError])
def test_an_error_has_no_token_in_any_part(kind: type[UserError], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-in-the-usual-form")
    error = kind(f"no {TOKEN}", where="not-in-the-usual-form", fix=f"use {TOKEN}")
    assert str(error) == "no ***\n  where: ***\n  fix:   use ***"
    assert (error.what, error.where, error.fix) == ("no ***", "***", "use ***")


def test_of_many_names_the_first_are_told_and_how_many_there_are() -> None:
    assert some(["a", "b"], 2) == "a, b" and some(["a", "b", "c", "d"], 2, "; ") == "a; b and 2 more"
