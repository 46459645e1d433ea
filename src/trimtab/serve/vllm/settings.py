"""What the command tells the door, which vLLM makes in a process of its own: one variable of the environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.serve.policy import Policy, policy_from

DOOR = "TRIMTAB_DOOR"
KEY = "TRIMTAB_API_KEY"


@dataclass(frozen=True)
class DoorSettings:
    """The options of `trimtab serve` that are about the door.

    Args:
        policy: The policy's file.
        max_dose: A cap besides the policy's.
        audit: The audit log's file, and the next two what is written there and how.
        access_log: The access log's file.
        body: Bytes of a request's body, at most.
        held: Bytes of all bodies together.
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

    def rules(self, environment: Mapping[str, str]) -> Policy:
        """The policy, with the key of the environment. Raises `TrimtabError` for one that can't hold on vLLM."""
        rules = policy_from(None if self.policy is None else Path(self.policy), self.max_dose, environment.get(KEY))
        if rules.monitors:
            raise UnsupportedError(
                f"the policy has the monitor {rules.monitors[0].name!r}, and vLLM's server reads no activations while"
                " it answers; leave monitors out, or serve with --engine transformers"
            )
        return rules

    def closes(self, rules: Policy) -> bool:
        """Whether nothing that generates is let past the door: there are rules, or a log in which all is to stand."""
        return rules != Policy() or self.audit is not None

    def to_text(self) -> str:
        """For the variable."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> DoorSettings:
        """Raises `TrimtabError` where it isn't there: nobody may take an open door for a closed one."""
        if DOOR not in environment:
            raise TrimtabError(f"{DOOR} isn't set; `trimtab serve --engine vllm` starts vLLM's server with it")
        return cls(**json.loads(environment[DOOR]))
