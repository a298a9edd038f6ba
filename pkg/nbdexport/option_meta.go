package nbdexport

import (
	"encoding/binary"
	"slices"
	"strings"
)

// metaContext answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func (h *handshake) metaContext(opt uint32, data []byte) error {
	if opt == optSetMetaContext {
		h.meta = metaContexts{} // also when this one fails
		if h.mode < modeStructured {
			h.reject(opt, repErrInvalid, "structured replies have to be negotiated first")
			return nil
		}
	}
	name, queries, valid := parseMetaContext(data)
	switch {
	case !valid:
		h.reject(opt, repErrInvalid, "malformed option")
		return nil
	case len(queries) > maxQueries:
		h.reject(opt, repErrTooBig, "more queries than the server takes")
		return nil
	}
	e, err := h.find(name)
	if e == nil {
		return h.notFound(opt, err)
	}
	var chosen []string
	for _, context := range e.store.contexts {
		if matches(opt, context, queries) {
			chosen = append(chosen, context)
		}
	}
	for i, context := range chosen {
		id := uint32(0)
		if opt == optSetMetaContext {
			id = contextID(i)
		}
		h.reply(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), context...))
	}
	h.reply(opt, repAck, nil)
	if opt == optSetMetaContext {
		h.meta = metaContexts{export: e, names: chosen}
	}
	return nil
}

// contextID is how replies to NBD_CMD_BLOCK_STATUS call the i-th context chosen.
func contextID(i int) uint32 { return uint32(i) + 1 }

// matches says whether a context is asked for. A list may ask for all of a
// namespace, or by no query for everything.
func matches(opt uint32, context string, queries []string) bool {
	if slices.Contains(queries, context) {
		return true
	}
	if opt == optSetMetaContext {
		return false
	}
	namespace, _, _ := strings.Cut(context, ":")
	return len(queries) == 0 || slices.Contains(queries, namespace+":")
}

// parseMetaContext takes the data of the options apart.
func parseMetaContext(data []byte) (name string, queries []string, valid bool) {
	name, data, valid = cutString(data)
	if !valid || !validName(name) || len(data) < 4 {
		return "", nil, false
	}
	count := binary.BigEndian.Uint32(data)
	data = data[4:]
	if uint64(count)*4 > uint64(len(data)) {
		return "", nil, false
	}
	for range count {
		var q string
		if q, data, valid = cutString(data); !valid || !validName(q) {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(data) == 0
}

// cutString takes a string with its 32-bit length off data.
func cutString(data []byte) (s string, rest []byte, valid bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if data = data[4:]; uint64(n) > uint64(len(data)) {
		return "", nil, false
	}
	return string(data[:n]), data[n:], true
}

// contextsOf are the contexts chosen for e, if any.
func (h *handshake) contextsOf(e *export) []string {
	if h.meta.export != e || len(h.meta.names) == 0 {
		return nil
	}
	return h.meta.names
}
