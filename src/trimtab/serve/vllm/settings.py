"""The settings that the command passes to `SteeringMiddleware`, which vLLM makes in another process: in an
environment variable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.serve.policy import Policy, policy_from

SETTINGS_VARIABLE = "TRIMTAB_DOOR"
KEY = "TRIMTAB_API_KEY"


@dataclass(frozen=True)
class MiddlewareSettings:
    """The options of `trimtab serve` that concern the middleware.

    Args:
        policy: The policy's file.
        max_dose: A cap in addition to the policy's.
        audit: The audit log's file.
        audit_prompts: Also log prompts.
        audit_sync: Wait until each line is on the disk itself.
        access_log: The access log's file.
        body: The most bytes of a request's body.
        held: The most bytes of all bodies together.
        local: The server is bound to a loopback address.
    """

    policy: str | None = None
    max_dose: float | None = None
    audit: str | None = None
    audit_prompts: bool = False
    audit_sync: bool = False
    access_log: str | None = None
    body: int = 1 << 20
    held: int = 256 << 20
    local: bool = False

    def load_policy(self, environment: Mapping[str, str]) -> Policy:
        """The policy, with the key from the environment. Raises `TrimtabError` for one that vLLM can't enforce."""
        rules = policy_from(None if self.policy is None else Path(self.policy), self.max_dose, environment.get(KEY))
        if rules.monitors:
            raise UnsupportedError(
                f"the policy has the monitor {rules.monitors[0].name!r}, but vLLM's server doesn't read activations;"
                " leave monitors out, or serve with --engine transformers"
            )
        return rules

    def closes(self, rules: Policy) -> bool:
        """Whether generation is only possible through the middleware: if there are rules, or an audit log to be
        complete.
        """
        return rules != Policy() or self.audit is not None

    def to_text(self) -> str:
        """The value of the environment variable."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> MiddlewareSettings:
        """The settings in the environment. Raises `TrimtabError` if there are none, so that no server is left open."""
        if SETTINGS_VARIABLE not in environment:
            raise TrimtabError(
                f"{SETTINGS_VARIABLE} isn't set; `trimtab serve --engine vllm` starts vLLM's server with it"
            )
        return cls(**json.loads(environment[SETTINGS_VARIABLE]))
