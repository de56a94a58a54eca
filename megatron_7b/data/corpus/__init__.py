"""What a tokenised corpus is on disk: its files, its manifest, how they are scanned and published."""
