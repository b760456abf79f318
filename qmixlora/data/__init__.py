"""Conversations with images: formats, loading, collating, surveys."""

from qmixlora.mixlora import IGNORED

from .appearance import APPEARANCE_VERSION
from .collate import BatchCollator, Collator
from .formats import IMAGE, Conversation, ImageFile, Turn, question_about
from .image_files import locate
from .images import check_body, check_header, image_size, open_images
from .loading import load_conversations
from .splits import load_source, load_split
from .tasks import indices_by_task, only_tasks

__all__ = [
    "APPEARANCE_VERSION",
    "IGNORED",
    "IMAGE",
    "BatchCollator",
    "Collator",
    "Conversation",
    "ImageFile",
    "Turn",
    "check_body",
    "check_header",
    "image_size",
    "indices_by_task",
    "load_conversations",
    "load_source",
    "load_split",
    "locate",
    "only_tasks",
    "open_images",
    "question_about",
]
