import sys
from pathlib import Path

# Test files are no package (import-mode importlib); what they share lies beside them.
sys.path.append(str(Path(__file__).parent))
