"""Tests against independent truths: diffusers in torch, attention in float64, schedules counted by hand."""
