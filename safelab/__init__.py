"""safelab: see, measure and stop the loss of safety that fine-tuning causes in language models.

Each module holds one idea; import what you need from it, for example
``from safelab.models import load_model``. Nothing heavy is imported here.
"""

__version__ = "0.1.0"
