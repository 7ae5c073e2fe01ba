"""What all tests share: order among the workers, and studies that several files look at."""

import pytest

from study_spaces import single_study, space_study

__all__ = ["single_study", "space_study"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What stays together on one worker comes first, so that no worker waits for it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
