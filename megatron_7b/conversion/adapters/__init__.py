"""Adapters ⇄ PEFT folders, and adapters merged into whole models."""
