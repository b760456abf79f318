"""Conversations with images: formats, loading, collating, surveys."""

from qmixlora.mixlora import IGNORED

from .answers import one_answer_each
from .appearance import APPEARANCE_VERSION
from .collate import BatchCollator, Collator
from .formats import IMAGE, Conversation, ImageFile, Turn, question_about
from .image_files import locate
from .images import check_body, check_header, image_size, open_images
from .lengths import Lengths
from .loading import load_conversations
from .rendering import Rendering, rendering_of, rendering_problem
from .splits import load_source, load_split
from .tasks import indices_by_task, only_tasks
from .taught import taught

__all__ = [
    "APPEARANCE_VERSION",
    "IGNORED",
    "IMAGE",
    "BatchCollator",
    "Collator",
    "Conversation",
    "ImageFile",
    "Lengths",
    "Rendering",
    "Turn",
    "check_body",
    "check_header",
    "image_size",
    "indices_by_task",
    "load_conversations",
    "load_source",
    "load_split",
    "locate",
    "one_answer_each",
    "only_tasks",
    "open_images",
    "question_about",
    "rendering_of",
    "rendering_problem",
    "taught",
]
