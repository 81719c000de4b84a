"""What the server holds from which runs are forked that will be killed: the model, once."""

from tests.small_windows import load_once

load_once()
