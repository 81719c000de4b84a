"""Text files in, validated rows and data sets out.

The one outside world here is text files: formats, encodings, broken quotes, splits. Everything
that is wrong with an input is a :class:`~spin_cli.errors.DataError` that names file and line.
"""

from spin_cli.dataset.cells import Row, column_text, text_fault
from spin_cli.dataset.collection import Dataset, Source, hash_sources, places, reread, scan
from spin_cli.dataset.folder import find_sources
from spin_cli.dataset.formats import detect_format
from spin_cli.dataset.labels import split_labels
from spin_cli.dataset.rows import BadRow, read_items, read_rows
from spin_cli.dataset.spool import spooled
from spin_cli.dataset.streams import is_live
from spin_cli.dataset.texts import read_texts

__all__ = [
    "BadRow",
    "Dataset",
    "Row",
    "Source",
    "column_text",
    "detect_format",
    "find_sources",
    "hash_sources",
    "is_live",
    "places",
    "read_items",
    "read_rows",
    "read_texts",
    "reread",
    "scan",
    "split_labels",
    "spooled",
    "text_fault",
]
