"""How requests are put into batches."""

from __future__ import annotations

from typing import Any

import torch

from trimtab import Add, Edit, Rejection, Site, Steering
from trimtab.engines.arguments import batches_of


class Order(list):
    """An order that nobody searches through, request by request."""

    def index(self, *_: Any) -> int:
        raise AssertionError("each request is looked for among all")


def test_what_is_not_steered_goes_with_the_first_in_order_and_nothing_is_searched_for() -> None:
    steering = Steering((Edit(Site(0), Add(torch.ones(4))),))
    order = Order([4, 2, 0, 3, 1])
    steerings = [steering, None, steering, None, steering]
    rejections = [None, None, Rejection(), None, None]
    assert batches_of(order, 3, steerings, rejections) == [[4, 0, 3], [1], [2]]
    assert batches_of(order, 5, [None] * 5, [None] * 5) == [[4, 2, 0, 3, 1]]
