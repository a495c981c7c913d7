"""The house's own rules: who may import whom, and what a wheel must hold."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
