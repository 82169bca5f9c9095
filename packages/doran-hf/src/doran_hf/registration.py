"""Importing this file registers DORAN with PEFT. The package imports the file before any of its names is used."""

from __future__ import annotations

from doran_hf.config import DoranConfig
from doran_hf.model import DoranModel
from doran_hf.peft_internals import register

__all__: list[str] = []

register(DoranConfig, DoranModel)
