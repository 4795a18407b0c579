"""What run scripts share where all the parts meet; nothing else imports it."""
