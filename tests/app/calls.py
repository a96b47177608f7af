"""How tests call the endpoints."""

from __future__ import annotations

import pytest
from gradio_client.exceptions import AppError

from mlpmoe.models import assets_folder

SPEC = {"branches": 8, "fade": 0.5, "keep": 6}
LEAKS = ("Traceback", "site-packages", ".py", 'File "', "/usr", "/tmp", "Errno")


def refused(client, api_name: str, *arguments, **values) -> str:
    """The sentence that a call is refused with."""
    with pytest.raises(AppError) as caught:
        client.predict(*arguments, api_name=api_name, **values)
    message = str(caught.value)
    assert message[0].isupper(), message
    assert message.endswith("."), message
    assert 15 < len(message) < 350
    assert not any(leak in message for leak in LEAKS), message
    assert str(assets_folder().parent) not in message
    return message
