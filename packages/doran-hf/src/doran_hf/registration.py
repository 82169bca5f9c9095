"""DORAN among PEFT's methods: importing this registers it. Imported by the package, before any name of it is used."""

from __future__ import annotations

from doran_hf.config import DoranConfig
from doran_hf.model import DoranModel
from doran_hf.peft_internals import register

__all__: list[str] = []

register(DoranConfig, DoranModel)
