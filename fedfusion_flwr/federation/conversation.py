# SPDX-License-Identifier: Apache-2.0
"""One round's exchange with the clients: its model, who is asked, and what each is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedfusion_flwr import protocol
from fedfusion_flwr.federation.round import State

Setting = str | int | float | bool | list[str]


@dataclass
class Conversation:
    """The round in progress.

    Attributes
    ----------
    server_round : int
        Its number.
    model, record : State, ArrayRecord
        The global model at its start, in both forms.
    sampled : dict[int, int]
        Client id by node id: who was asked last.
    sent : dict[int, State]
        What each of them was sent, by client id.
    """

    server_round: int
    model: State
    record: ArrayRecord
    sampled: dict[int, int] = field(default_factory=dict)
    sent: dict[int, State] = field(default_factory=dict)

    def ask(self, cohort: dict[int, int], state_of: Callable[[int], State]) -> None:
        """Note who is asked next (client by node), and what each is sent."""
        self.sampled = cohort
        self.sent = {client: state_of(client) for client in cohort.values()}

    def messages(
        self,
        message_type: str,
        config: ConfigRecord,
        settings_of: Callable[[int], Mapping[str, Setting]],
        keys: tuple[str, str],
    ) -> list[Message]:
        """Address to everybody asked what they are sent; equal objects are encoded once.

        Parameters
        ----------
        message_type : str
            Flower's.
        config : ConfigRecord
            The caller's part of every config; not changed.
        settings_of : Callable[[int], Mapping[str, Setting]]
            The strategy's part, by client.
        keys : tuple[str, str]
            Names of the ArrayRecord and of the ConfigRecord.
        """
        arrays_key, config_key = keys
        records = {id(self.model): self.record}
        messages = []
        for node, client in self.sampled.items():
            state = self.sent[client]
            if id(state) not in records:
                records[id(state)] = protocol.record_from_state(state)
            arrays = records[id(state)]
            settings = ConfigRecord({**config, protocol.SERVER_ROUND: self.server_round})
            settings.update(settings_of(client))
            content = RecordDict({arrays_key: arrays, config_key: settings})
            messages.append(Message(content, node, message_type))
        return messages
