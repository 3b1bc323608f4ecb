"""Tests of the image that containers/Dockerfile makes."""
