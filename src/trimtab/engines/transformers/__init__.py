"""The default engine: any causal language model that transformers loads."""

from logging import LogRecord, getLogger

CHATTER = {"torchao": "Failed to load", "torch.utils._pytree": "is an Enum subclass and is now natively supported"}
"""Messages logged while torchao is imported that are dropped, by logger."""


def _unless_chatter(record: LogRecord) -> bool:
    return CHATTER.get(record.name, "\0") not in record.getMessage()


for _name in CHATTER:
    getLogger(_name).addFilter(_unless_chatter)
