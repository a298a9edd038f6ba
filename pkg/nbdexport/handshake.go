package nbdexport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// handshake is a connection until it is attached to an export. It belongs to
// one goroutine.
type handshake struct {
	s   *Server
	raw net.Conn // as it was accepted
	nc  net.Conn // raw, or TLS over it
	in  *reader
	out []byte // the replies to the option at hand

	secure   bool // nc is TLS
	noZeroes bool
	mode     replyMode
	meta     metaContexts
}

// metaContexts are what NBD_OPT_SET_META_CONTEXT chose, last.
type metaContexts struct {
	export *export // whose they are; nil for none
	names  []string
}

// The ends of a handshake that are not failures.
var (
	errAborted = errors.New("client ended the handshake")
	errRefused = errors.New("export refused")
)

// serve is the whole life of a connection.
func (h *handshake) serve() {
	defer h.s.left(h.raw)
	c, err := h.negotiate()
	h.s.shook(h.raw)
	if err != nil {
		h.close(err)
		return
	}
	c.serve()
}

func (h *handshake) close(err error) {
	switch {
	case err == errAborted, err == io.EOF, h.s.closed():
	case errors.Is(err, os.ErrDeadlineExceeded):
		h.s.log.Info("handshake not finished in time", "from", h.raw.RemoteAddr(), "limit", handshakeTime)
	default:
		h.s.log.Info("handshake failed", "from", h.raw.RemoteAddr(), "err", err)
	}
	h.nc.Close() // nothing was promised to the client that could be lost
}

// negotiate speaks the handshake. On success the connection is attached.
func (h *handshake) negotiate() (*conn, error) {
	if err := h.deadline(); err != nil {
		return nil, err
	}
	h.in = newReader(h.nc, handshakeBuffer)
	b := binary.BigEndian.AppendUint64(nil, magicInit)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if _, err := h.nc.Write(b); err != nil {
		return nil, err
	}
	f, err := h.in.next(4)
	if err != nil {
		return nil, err
	}
	flags := binary.BigEndian.Uint32(f)
	if unknown := flags &^ (clientFixedNewstyle | clientNoZeroes); unknown != 0 {
		return nil, fmt.Errorf("unknown client flags %#x", unknown)
	}
	h.noZeroes = flags&clientNoZeroes != 0
	for {
		c, err := h.option()
		if c != nil || err != nil {
			return c, err
		}
	}
}

// deadline limits the handshake as a whole.
func (h *handshake) deadline() error {
	if err := h.raw.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return err
	}
	if h.s.closed() { // begin has perhaps set its deadline before we did
		return errClosed
	}
	return nil
}

// option reads one option and answers it. It returns a connection when the
// handshake is over.
func (h *handshake) option() (*conn, error) {
	b, err := h.in.next(16)
	if err != nil {
		return nil, err
	}
	if m := binary.BigEndian.Uint64(b); m != magicOption {
		return nil, fmt.Errorf("option magic %#x, want %#x", m, magicOption)
	}
	opt, length := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
	h.out = h.out[:0]

	if length > maxOptionData {
		if opt == optExportName {
			return nil, fmt.Errorf("NBD_OPT_EXPORT_NAME: a name of %d bytes", length)
		}
		if err := h.in.skip(int64(length)); err != nil {
			return nil, err
		}
		switch {
		case opt == optAbort:
			length = 0
		case opt >= optList && opt <= optExtendedHeaders:
			h.reject(opt, repErrTooBig, "option longer than the server takes")
			return nil, h.send()
		default:
			h.reject(opt, repErrUnsup, "option not known")
			return nil, h.send()
		}
	}
	data, err := h.data(int(length))
	if err != nil {
		return nil, err
	}
	return h.answer(opt, data)
}

// data is the data of an option. Its memory follows what arrives.
func (h *handshake) data(n int) ([]byte, error) {
	var data []byte
	for len(data) < n {
		b, err := h.in.next(min(n-len(data), handshakeBuffer))
		if err != nil {
			return nil, noEOF(err)
		}
		data = append(data, b...)
	}
	return data, nil
}

func (h *handshake) answer(opt uint32, data []byte) (*conn, error) {
	switch {
	case opt == optAbort:
		h.reply(opt, repAck, nil)
		_ = h.send() // the client need not wait for the reply
		return nil, errAborted
	case h.s.closed():
		if opt == optExportName {
			return nil, errClosed
		}
		h.reject(opt, repErrShutdown, "server is shutting down")
		return nil, h.send()
	case opt == optStartTLS:
		return nil, h.startTLS(data)
	case h.s.o.TLS != nil && !h.secure:
		if opt == optExportName {
			return nil, errors.New("NBD_OPT_EXPORT_NAME without the TLS that is required")
		}
		h.reject(opt, repErrTLSReqd, "this server requires TLS")
		return nil, h.send()
	case opt == optExportName:
		return h.exportName(string(data))
	case opt == optInfo, opt == optGo:
		return h.infoOrGo(opt, data)
	case opt == optList:
		h.list(data)
	case opt == optStructuredReply, opt == optExtendedHeaders:
		h.headers(opt, data)
	case opt == optListMetaContext, opt == optSetMetaContext:
		if err := h.metaContext(opt, data); err != nil {
			return nil, err
		}
	default:
		h.reject(opt, repErrUnsup, "option not known")
	}
	return nil, h.send()
}

// headers answers the options that choose the form of replies.
func (h *handshake) headers(opt uint32, data []byte) {
	want := modeStructured
	if opt == optExtendedHeaders {
		want = modeExtended
	}
	switch {
	case len(data) > 0:
		h.reject(opt, repErrInvalid, "this option has no data")
	case h.mode == want:
		h.reject(opt, repErrInvalid, "negotiated already")
	case h.mode > want:
		h.reject(opt, repErrExtHeaderReqd, "extended headers are negotiated already")
	default:
		h.mode = want
		h.reply(opt, repAck, nil)
	}
}

// reply adds a reply to the option.
func (h *handshake) reply(opt, typ uint32, data []byte) {
	h.out = binary.BigEndian.AppendUint64(h.out, magicOptionReply)
	h.out = binary.BigEndian.AppendUint32(h.out, opt)
	h.out = binary.BigEndian.AppendUint32(h.out, typ)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(len(data)))
	h.out = append(h.out, data...)
}

// reject replies an error with a message for people.
func (h *handshake) reject(opt, typ uint32, message string) {
	h.reply(opt, typ, []byte(message))
}

// send sends what reply has gathered.
func (h *handshake) send() error {
	_, err := h.nc.Write(h.out)
	return err
}
