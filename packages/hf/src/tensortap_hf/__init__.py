"""tensortap for Hugging Face transformers: canonical names, attention and state-space taps.

Nothing here is called by users: `tensortap.attach` finds the integration by itself once
transformers has been imported.
"""

__version__ = "0.1.0"
