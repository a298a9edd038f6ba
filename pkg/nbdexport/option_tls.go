package nbdexport

import (
	"crypto/tls"
	"errors"
	"fmt"
)

// startTLS answers NBD_OPT_STARTTLS. What was negotiated before counts for
// nothing after it.
func (h *handshake) startTLS(data []byte) error {
	switch {
	case h.s.o.TLS == nil:
		h.reject(optStartTLS, repErrPolicy, "this server has no TLS")
		return h.send()
	case h.secure:
		h.reject(optStartTLS, repErrInvalid, "TLS is negotiated already")
		return h.send()
	case len(data) > 0:
		h.reject(optStartTLS, repErrInvalid, "this option has no data")
		return h.send()
	}
	// Plaintext that somebody slipped in behind the option must not be taken
	// for the client's after the change. The client itself waits for the reply.
	if h.in.buffered() > 0 {
		return errors.New("NBD_OPT_STARTTLS: data behind the option, before TLS")
	}
	h.reply(optStartTLS, repAck, nil)
	if err := h.send(); err != nil {
		return err
	}
	t := tls.Server(h.raw, h.s.o.TLS)
	h.nc = t
	if err := t.Handshake(); err != nil { // in the time of the handshake as a whole
		return fmt.Errorf("TLS: %w", err)
	}
	h.in = newReader(t, handshakeBuffer)
	h.secure, h.mode, h.meta = true, modeSimple, metaContexts{}
	return nil
}
