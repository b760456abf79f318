"""The environment of the tests and of the processes that they start, set before anything heavy is imported."""

import os
from pathlib import Path

import processor_packages

PROCESSORS = Path(__file__).parent / "processors"  # its sitecustomize.py does in other processes what is done here

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROCESSORS), os.environ.get("PYTHONPATH")]))
processor_packages.install()
