"""The letter of an option in an answer, in the usual wordings.

What may be none is none: it is worse to take a wrong answer for right than to miss an odd wording.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .wording import normalize

ASCII = {full: full - 0xFEE0 for full in range(0xFF01, 0xFF5F)}  # letters and marks of full width, as in Chinese
ALONE = re.compile(r"^\W*([A-Za-z])\W*$")
OPTION = re.compile(r"^\s*\(?([A-Za-z])([.):])\s+(\S.*)$", re.DOTALL)  # a letter, its mark and the option's text
REASON = r"(?:because|since|as)\b"
FOLLOWING = re.compile(rf"\.?\s+(?!{REASON})(\w.*)", re.DOTALL)  # a text after a letter

# A and I begin sentences as words: they are letters where no word follows but one of these; none is in `T-shirt`, `I'm`
LETTER = rf"(?:[B-HJ-Z]\b|[AI]\b(?!\s+(?!{REASON}|(?:and|or|but|is (?:the|right|correct))\b)\w))(?!['\u2019-]\w)"
REJECTED = re.compile(
    r"\b(?:[Oo]ption |[Cc]hoice )?\(?[A-Za-z]\)? is (?:wrong|incorrect|false|not)\b"
    r"|(?:not|n['\u2019]t) (?:(?:be|choose|pick|option|choice) )*\(?[A-Z]\b\)?"
)
ONE = rf"[(\"']?\b{LETTER}[)\"']?"
COMMA, WORD = r"\s*[,/&\u3001]\s*", r",?\s*\b(?:and|or)\b(?:\s+(?:maybe|perhaps|rather))?\s*"
SEVERAL = re.compile(  # `A or B`, `A, B`; not `C, D would be wrong`
    rf"{ONE}(?:{COMMA}{ONE})*(?:{WORD}{ONE})+|{ONE}(?:{COMMA}{ONE})+(?!\s+(?!are\b|both\b)\w)"
)
ANSWER = r"(?:answer|\bans|\u7b54\u6848)"
CHOICES = (  # in the order in which they are believed
    ALONE.pattern,
    r"\\boxed\{(?:\\text\{)?\W*([A-Za-z])\W*\}",
    r"^\W*([A-Z])[.):,]+\s",  # begins it, before a mark
    r"^\W*([a-z])[.):]+\s+(?![A-Za-z](?:\.|$))",  # but `a. m.`
    r"(?<!\w)\(([A-Za-z])\)",
    rf"(?i:{ANSWER}(?:\s*(?:is|\u662f|\u4e3a|\u70ba))?)\W*({LETTER})",
    rf"(?i:(?:option|choice)(?: is)?|choose|pick)\W*({LETTER})",
    rf"(?i:{ANSWER} is|{ANSWER}:|option|choice)\W*([a-z])\W*$",
    r"^\W*([B-HJ-Z]|[AI](?=\s+is (?:the|right|correct)\b))\s",
    r"(?:\b(?i:is|be|choose|pick|say|go with)|['\u2019]s)\W+([A-HJ-Z])\W*$",
)


def choice(answer: str, references: Sequence[str]) -> float:
    """The letter of an option (`B`, `(b)`, `**B**`, `B. a cat`, `Answer: b`, `I think it is B`), or else its text.

    A letter is looked for only where the reference is one (`B`, `(b)`) or has one before its text (`B. a cat`); since
    `E. coli` looks the same, an answer with that letter and another text is not right there. Several letters together
    (`A or B`) are none. Other references are texts: right is what is the same but for case, blanks and a closing full
    stop.
    """
    said = answer.translate(ASCII)
    return max(float(_chooses(said, reference.translate(ASCII))) for reference in references)


def _chooses(answer: str, reference: str) -> bool:
    option, alone = OPTION.match(reference), ALONE.match(reference)
    letter, mark, text = option.groups() if option else (alone.group(1) if alone else "", "", "")
    plain = REJECTED.sub("", re.sub(r"[*`]", "", answer))  # without Markdown's marks
    single = SEVERAL.sub(lambda several: " " * len(several.group()), plain)
    said = next((found for pattern in CHOICES if (found := re.search(pattern, single))), None)
    if not letter or said is None:
        return normalize(answer) in {normalize(reference), normalize(text or reference)}
    following = FOLLOWING.match(plain, said.end(1)) if mark == "." else None
    is_option = following is None or normalize(following.group(1)).startswith(normalize(text))
    return is_option and said.group(1).upper() == letter.upper()
