"""Imports layers that older programs pickled as whole modules. A separate, locked process reads them."""
