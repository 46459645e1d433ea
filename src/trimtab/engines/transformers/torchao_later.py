"""transformers without torchao, until a model is quantized by it.

transformers imports torchao wherever it is installed, used or not, which takes half a second. Its quantizer for torchao
stands in a module of its own. That is imported here as if torchao weren't there, and once more, in the same place, when
such a quantizer is made.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

QUANTIZERS = "transformers.quantizers"
MODULE, KIND = f"{QUANTIZERS}.quantizer_torchao", "TorchAoHfQuantizer"
ASKED = "is_torchao_available"


def defer_torchao() -> None:
    """Import transformers' quantizers without torchao. Does nothing where either was imported already."""
    if QUANTIZERS in sys.modules or "torchao" in sys.modules or find_spec("torchao") is None:
        return
    from transformers import utils
    from transformers.utils import import_utils

    real = getattr(utils, ASKED, None)
    if real is None or getattr(import_utils, ASKED, None) is not real:
        return

    def never(*_: Any, **__: Any) -> bool:
        return False

    for module in (utils, import_utils):
        setattr(module, ASKED, never)
    try:
        import transformers.quantizers  # noqa: F401
    finally:
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "transformers" and vars(module).get(ASKED) is never:
                setattr(module, ASKED, real)
    own: Any = getattr(sys.modules.get(MODULE), KIND, None)
    if own is None:
        return
    init = own.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        own.__init__ = init
        importlib.reload(sys.modules[MODULE])  # its functions look up names there, those of this class as well
        init(self, *args, **kwargs)

    own.__init__ = begin
