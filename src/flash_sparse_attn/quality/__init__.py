"""What reading W keys costs in quality: small models that differ in nothing but attention."""
