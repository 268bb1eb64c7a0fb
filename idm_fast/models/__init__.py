"""The networks: IDM and its U-Net."""

from idm_fast.models.idm import IDM

__all__ = ["IDM"]
