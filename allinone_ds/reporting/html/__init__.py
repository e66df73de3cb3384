"""Parts of HTML pages."""
