"""``python -m sklearn_lqf`` prints versions, devices and the backbones that are available offline."""

from .versions import show_versions

if __name__ == "__main__":
    show_versions()
