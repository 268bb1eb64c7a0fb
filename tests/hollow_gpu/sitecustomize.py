"""What every process on the hollow GPU must do without: attention by cuDNN, and looks at values."""

try:
    import torch

    from idm_fast import IDM
except ImportError:  # the environment of other libraries
    pass
else:

    def unchecked(self: IDM) -> None:
        pass

    torch.backends.cuda.enable_cudnn_sdp(False)
    IDM.check_parameters = unchecked
