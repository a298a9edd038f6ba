package nbdexport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// validName says that a string is one by the protocol's rules.
func validName(s string) bool {
	return len(s) <= maxName && utf8.ValidString(s) && !strings.ContainsRune(s, 0)
}

// exportName answers NBD_OPT_EXPORT_NAME, which knows no error but the end.
func (h *handshake) exportName(name string) (*conn, error) {
	var e *export
	if validName(name) {
		var err error
		if e, err = h.find(name); err != nil {
			return nil, err
		}
	}
	if e == nil {
		return nil, fmt.Errorf("NBD_OPT_EXPORT_NAME: %w: no export %.64q", errRefused, name)
	}
	c, err := h.attach(e)
	if err != nil {
		return nil, err
	}
	h.out = binary.BigEndian.AppendUint64(h.out, uint64(e.store.size))
	h.out = binary.BigEndian.AppendUint16(h.out, c.flags)
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, 124)...)
	}
	return h.start(c)
}

// infoOrGo answers NBD_OPT_INFO and NBD_OPT_GO.
func (h *handshake) infoOrGo(opt uint32, data []byte) (*conn, error) {
	name, wanted, valid := parseInfo(data)
	if !valid {
		h.reject(opt, repErrInvalid, "malformed option")
		return nil, h.send()
	}
	e, err := h.find(name)
	if e == nil {
		if err := h.notFound(opt, err); err != nil {
			return nil, err
		}
		return nil, h.send()
	}
	if opt == optInfo {
		h.info(opt, e, wanted, e.store.flags(e.ReadOnly, h.mode, h.contextsOf(e) != nil))
		h.reply(opt, repAck, nil)
		return nil, h.send()
	}
	c, err := h.attach(e)
	switch err {
	case nil:
	case errRemoved:
		h.reject(opt, repErrUnknown, "no such export")
		return nil, h.send()
	case errFull:
		h.reject(opt, repErrPolicy, "the export has as many clients as it may have")
		return nil, h.send()
	default:
		return nil, err
	}
	h.info(opt, e, wanted, c.flags)
	h.reply(opt, repAck, nil)
	return h.start(c)
}

// notFound answers an option for an export that there is not; err is why find gave
// up. It returns an error if there is nobody to answer to.
func (h *handshake) notFound(opt uint32, err error) error {
	switch {
	case err == nil:
		h.reject(opt, repErrUnknown, "no such export")
	case errors.Is(err, errClosed):
		h.reject(opt, repErrShutdown, "server is shutting down")
	case err == errCrowded:
		h.reject(opt, repErrPolicy, "too many clients wait for exports that have not come yet")
	default:
		return err
	}
	return nil
}

// parseInfo takes the data of NBD_OPT_INFO and NBD_OPT_GO apart. What is
// wanted twice, or unknown, is left out.
func parseInfo(data []byte) (name string, wanted []uint16, valid bool) {
	if len(data) < 6 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if uint64(n) > uint64(len(data)-6) {
		return "", nil, false
	}
	name = string(data[4 : 4+n])
	data = data[4+n:]
	count := int(binary.BigEndian.Uint16(data))
	if data = data[2:]; len(data) != 2*count || !validName(name) {
		return "", nil, false
	}
	for i := range count {
		w := binary.BigEndian.Uint16(data[2*i:])
		if w <= infoBlockSize && !slices.Contains(wanted, w) {
			wanted = append(wanted, w)
		}
	}
	return name, wanted, true
}

// info adds the replies NBD_REP_INFO.
func (h *handshake) info(opt uint32, e *export, wanted []uint16, flags uint16) {
	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(e.store.size))
	h.reply(opt, repInfo, binary.BigEndian.AppendUint16(b, flags))
	for _, w := range wanted {
		b = binary.BigEndian.AppendUint16(b[:0], w)
		switch w {
		case infoName:
			h.reply(opt, repInfo, append(b, e.Name...))
		case infoDescription:
			if e.Description != "" {
				h.reply(opt, repInfo, append(b, e.Description...))
			}
		case infoBlockSize:
			b = binary.BigEndian.AppendUint32(b, minBlockSize)
			b = binary.BigEndian.AppendUint32(b, preferredBlockSize)
			h.reply(opt, repInfo, binary.BigEndian.AppendUint32(b, maxPayload))
		}
	}
}

// attach makes the connection a client of e. Waiting for the clients before it
// does not count as the client's time.
func (h *handshake) attach(e *export) (*conn, error) {
	c := newConn(h, e)
	if err := e.attach(c, h.s.done); err != nil {
		return nil, err
	}
	return c, nil
}

// start sends the last reply of the handshake. From then on c is the
// connection.
func (h *handshake) start(c *conn) (*conn, error) {
	h.s.shook(h.raw) // before the client knows: it counts as attached then
	err := h.raw.SetDeadline(time.Now().Add(handshakeTime))
	if err == nil {
		err = h.send()
	}
	if err == nil {
		err = h.raw.SetDeadline(time.Time{})
	}
	if c.stopped() {
		c.stop() // its deadlines were perhaps set before we took ours away
	}
	if err != nil {
		c.abandon()
		return nil, err
	}
	return c, nil
}

// list answers NBD_OPT_LIST.
func (h *handshake) list(data []byte) {
	if len(data) > 0 {
		h.reject(optList, repErrInvalid, "this option has no data")
		return
	}
	for _, e := range h.s.list() {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		b = append(b, e.Name...)
		h.reply(optList, repServer, append(b, e.Description...))
	}
	for _, name := range h.s.expected() {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
		b = append(b, name...)
		h.reply(optList, repServer, append(b, "has not come yet: a client that attaches waits"...))
	}
	h.reply(optList, repAck, nil)
}
