"""Imports layers that older programs pickled as whole modules. A separate process without network reads them."""
