"""What libraries remark on the way stays off the screen: what they raise is told in our own lines.

For the commands alone: importing a module of this project changes no logger and no filter.
"""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence diffusers, transformers and huggingface_hub, their bars for small files too."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"huggingface_hub\b")  # on flags that diffusers sets
    warnings.filterwarnings("ignore", module=r"torch\._weights_only_unpickler")  # old pickles
    warnings.filterwarnings("ignore", module=r"torch\._dynamo\b")  # on what it traces in diffusers
    import diffusers
    import huggingface_hub
    import transformers

    # Not just below errors: it logs as one what it raises, and what it then tries otherwise.
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
