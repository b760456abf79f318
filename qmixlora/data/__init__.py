"""Conversations with images: formats, loading, collating, surveys."""

from qmixlora.mixlora import IGNORED

from .checking.answer_lengths import generated_lengths, too_long_to_generate
from .checking.facts import DataFacts, answers_by_task
from .checking.taught import Checked, checked, taught
from .formats import IMAGE, Conversation, ImageFile, Turn, question_about, sample_name, to_messages, words
from .images.appearance import APPEARANCE_VERSION
from .images.files import locate
from .images.keys import content_key
from .images.opening import check_body, check_header, image_size, open_images
from .reading.loading import load_conversations
from .reading.usual import usual_columns
from .rendering.answers import one_answer_each
from .rendering.collate import Collator, PromptRouting
from .rendering.image_marks import image_tokens_of
from .rendering.lengths import Lengths, lengths_of, sizes_of
from .rendering.rendering import Rendering, rendering_of, rendering_problem
from .rendering.token_batches import longest_first, token_batches
from .splits.identity import SCORED, fingerprint
from .splits.loading import held_out_split, load_source, load_split, splits_of
from .splits.tasks import indices_by_answer, indices_by_task, indices_of_tasks, only_tasks

__all__ = [
    "APPEARANCE_VERSION",
    "IGNORED",
    "IMAGE",
    "SCORED",
    "Checked",
    "Collator",
    "Conversation",
    "DataFacts",
    "ImageFile",
    "Lengths",
    "PromptRouting",
    "Rendering",
    "Turn",
    "answers_by_task",
    "check_body",
    "check_header",
    "checked",
    "content_key",
    "fingerprint",
    "generated_lengths",
    "held_out_split",
    "image_size",
    "image_tokens_of",
    "indices_by_answer",
    "indices_by_task",
    "indices_of_tasks",
    "lengths_of",
    "load_conversations",
    "load_source",
    "load_split",
    "locate",
    "longest_first",
    "one_answer_each",
    "only_tasks",
    "open_images",
    "question_about",
    "rendering_of",
    "rendering_problem",
    "sample_name",
    "sizes_of",
    "splits_of",
    "taught",
    "to_messages",
    "token_batches",
    "too_long_to_generate",
    "usual_columns",
    "words",
]
