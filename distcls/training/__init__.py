"""Training: from a config to the best model."""

import warnings

# accelerate imports tqdm's bar for notebooks, which is never shown here; without ipywidgets that
# warns in the first cell of everybody's notebook
warnings.filterwarnings("ignore", message="IProgress not found")
